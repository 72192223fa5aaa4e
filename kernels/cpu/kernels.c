/* The CPU kernels, one translation unit, which kernels_cpu.py compiles for the machine that runs it. This file is the
   contract with it, and chooses an instruction set and the engine of several rows.

   Letters: M rows of an activation, K columns, N output features; B sequences, H heads, S queries, T keys, D numbers a
   head. Dtypes: FLOAT 0, HALF 1, BFLOAT 2. Functions that return int return OK 0 or NO_MEMORY 1. All tensors are
   contiguous unless strides are given, and need only the alignment of their dtype. `threads`: at most so many. */
#include "common.h"

/* Whether the instructions this was compiled for may be used: 0 if the system refuses the matrix unit. */
int chatglm_start(void);

/* The instruction set, in words. */
const char* chatglm_instructions(void);

/* y [M, N] = x [M, K] · (scale · weight)ᵀ + bias. x and y have x_dtype. weight is int8 [N, K], or with 4 bits [N, K /
   2], the even column in the high nibble. scale [N] and bias [N] (or NULL) have dtypes of their own. */
int chatglm_linear(const void* x, int x_dtype, const int8_t* weight, int bits, const void* scale, int scale_dtype,
                   const void* bias, int bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int threads);

/* y [M, N] = x [M, K] · weight [N, K]ᵀ for few rows. x and y have x_dtype; weight is HALF or BFLOAT. */
int chatglm_half_linear(const void* x, int x_dtype, const uint16_t* weight, int weight_dtype, void* y, int64_t M,
                        int64_t N, int64_t K, int threads);

/* context [B, S, H, D] = softmax(scaling · q · kᵀ + mask) · v. q [B, H, S, D], k and v [B, H, T, D] and mask [B, S, T]
   (or NULL) have one dtype; all but D and the mask's T have strides (in numbers); mask_b and mask_s may be 0. D is a
   multiple of 16, 256 at most. */
int chatglm_attention(const void* q, int64_t q_b, int64_t q_h, int64_t q_s, const void* k, int64_t k_b, int64_t k_h,
                      int64_t k_t, const void* v, int64_t v_b, int64_t v_h, int64_t v_t, const void* mask,
                      int64_t mask_b, int64_t mask_s, void* context, int dtype, float scaling, int64_t B, int64_t H,
                      int64_t S, int64_t T, int64_t D, int threads);

/* Rotate queries and keys in place: x [rows, H, 3·D] has a query, a key and a value a head; cosine and sine [rows, D].
   D, 256 at most, has `parts` parts; in each the first half is rotated with the second. */
void chatglm_rotary(void* x, const void* cosine, const void* sine, int dtype, int64_t rows, int64_t H, int64_t D,
                    int64_t parts, int threads);

/* x = gelu(x) in its tanh form, in place. */
void chatglm_gelu(void* x, int dtype, int64_t count, int threads);

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "isa/avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "isa/avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "isa/neon.h"
#else
#include "isa/portable.h"
#endif
#include "activations.h"

/* ENGINE(j, function) is that function of the engine that multiplies the rows of job j. */
#if (defined(__AMX_INT8__) && defined(__linux__)) || defined(EMULATE_AMX)
#include "tiles/amx.h"
#define ENGINE(j, function) amx_##function
enum { HAS_PAIRS = 0 };
#elif UNSIGNED_WEIGHTS && defined(ISA_AVX512)
#include "tiles/bytes.h"
#include "tiles/pairs.h"
#define ENGINE(j, function) ((j)->pairs ? pairs_##function : bytes_##function)
enum { HAS_PAIRS = 1 };
#elif UNSIGNED_WEIGHTS
#include "tiles/bytes.h"
#define ENGINE(j, function) bytes_##function
enum { HAS_PAIRS = 0 };
#else
#include "tiles/plain.h"
#define ENGINE(j, function) plain_##function
enum { HAS_PAIRS = 0 };
#endif

int chatglm_start(void) { return tiles_allowed(); }
const char* chatglm_instructions(void) { return INSTRUCTIONS; }

#include "linear_one_row.h"
#include "linear.h"
#include "half_linear.h"
#include "attention.h"
#include "rotary.h"
#include "gelu.h"
