/* Compares the CPU kernels with double precision. Memory is `malloc`ed to the byte, so that a sanitizer sees what is
   read or written beside. Prints the instructions and how many numbers are wrong; exits with 77 where the system
   refuses the matrix unit. */
#include "../kernels/cpu/kernels.c"

#include <stdio.h>
static unsigned seed = 1;
static double uniform(void) { return (seed = seed * 1664525u + 1013904223u) / 2147483648.0 - 1; }
static void* fresh(int64_t size) {
    void* p = malloc((size_t)size);
    memset(p, 255, (size_t)size);
    return p;
} /* NaN */
static int wrong = 0;
static void expect(const char* what, double got, double expected, double bound) {
    if (!(fabs(got - expected) <= bound) && wrong++ < 9)
        printf("%s: got %.9g, expected %.9g within %.3g\n", what, got, expected, bound);
}
static void set(void* p, int dtype, int64_t i, double value) {
    if (dtype == FLOAT)
        ((float*)p)[i] = (float)value;
    else
        ((uint16_t*)p)[i] = dtype == HALF ? to_half((float)value) : to_bfloat((float)value);
}
static void* filled(int dtype, int64_t count, double size) {
    void* p = fresh(count * size_of(dtype));
    for (int64_t i = 0; i < count; i++) set(p, dtype, i, uniform() * size);
    return p;
}
static const double rounding[] = {0x1p-24, 0x1p-11, 0x1p-8}, left_over[] = {0x1p-23, 0x1p-15, 0x1p-15};

static void linear(int64_t M, int64_t N, int64_t K, int bits, int dtype, int has_bias, int threads) {
    int other = (dtype + 1) % 3;
    void *x = filled(dtype, M * K, 1), *scale = filled(other, N, 0.01), *y = fresh(M * N * size_of(dtype));
    void* bias = has_bias ? filled((dtype + 2) % 3, N, 1) : NULL;
    int8_t* w = fresh(N * K * bits / 8);
    for (int64_t i = 0; i < N * K * bits / 8; i++) w[i] = (int8_t)(int)(uniform() * 128.9);
    if (chatglm_linear(x, dtype, w, bits, scale, other, bias, (dtype + 2) % 3, y, M, N, K, threads)) wrong++;
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0, size = 0, weights = 0, s = element(scale, other, n);
            for (int64_t k = 0; k < K; k++) {
                int8_t byte = w[n * (K * bits / 8) + k * bits / 8];
                double value = s * (bits == 8 ? byte : k % 2 ? (byte & 7) - (byte & 8) : byte >> 4);
                double product = value * element(x, dtype, m * K + k);
                sum += product, size += fabs(product), weights += fabs(value);
            }
            if (bias) sum += element(bias, (dtype + 2) % 3, n);
            double bound = size * (8 + sqrt((double)K)) * 0x1p-24 + left_over[dtype] * weights +
                           (fabs(sum) * 1.01 + size * 0x1p-23) * rounding[dtype] + 0x1p-22;
            expect("linear", element(y, dtype, m * N + n), sum, bound);
        }
    free(x), free(scale), free(y), free(bias), free(w);
}

static void half(int64_t M, int64_t N, int64_t K, int dtype, int weight_dtype, int threads) {
    void *x = filled(dtype, M * K, 1), *w = filled(weight_dtype, N * K, 1), *y = fresh(M * N * size_of(dtype));
    if (chatglm_half_linear(x, dtype, w, weight_dtype, y, M, N, K, threads)) wrong++;
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) {
            double sum = 0;
            for (int64_t k = 0; k < K; k++)
                sum += (double)element(x, dtype, m * K + k) * element(w, weight_dtype, n * K + k);
            double bound = (double)K * 0x1p-22 + fabs(sum) * 1.01 * rounding[dtype];
            expect("half_linear", element(y, dtype, m * N + n), sum, bound);
        }
    free(x), free(w), free(y);
}

static void attend(int64_t B, int64_t H, int64_t S, int64_t T, int64_t D, int dtype, int threads) {
    void *q = filled(dtype, B * H * S * D, 2), *k = filled(dtype, B * H * T * D, 2);
    void* v = filled(dtype, B * H * T * D, 1);
    void *mask = filled(dtype, B * S * T, 2), *y = fresh(B * H * S * D * size_of(dtype));
    double* p = fresh(T * 8);
    if (chatglm_attention(q, H * S * D, S * D, D, k, H * T * D, T * D, D, v, H * T * D, T * D, D, mask, S * T, T, y,
                          dtype, 0.25f, B, H, S, T, D, threads))
        wrong++;
    for (int64_t i = 0; i < B * H * S; i++) { /* query i of [B, H, S] */
        int64_t b = i / S / H, h = i / S % H, s = i % S;
        double whole = 0;
        for (int64_t t = 0; t < T; t++) {
            double score = 0;
            for (int64_t d = 0; d < D; d++)
                score += (double)element(q, dtype, i * D + d) * element(k, dtype, (i / S * T + t) * D + d);
            whole += p[t] = exp(score * 0.25 + element(mask, dtype, (b * S + s) * T + t));
        }
        for (int64_t d = 0; d < D; d++) {
            double sum = 0, got = element(y, dtype, ((b * S + s) * H + h) * D + d);
            for (int64_t t = 0; t < T; t++) sum += p[t] / whole * element(v, dtype, (i / S * T + t) * D + d);
            expect("attention", got, sum, 1e-4 + fabs(sum) * 1.01 * rounding[dtype]);
        }
    }
    free(q), free(k), free(v), free(mask), free(y), free(p);
}

static void rotate(int64_t rows, int64_t H, int64_t D, int64_t parts, int dtype, int threads) {
    void *x = filled(dtype, rows * H * 3 * D, 1), *c = filled(dtype, rows * D, 1), *s = filled(dtype, rows * D, 1);
    void* y = fresh(rows * H * 3 * D * size_of(dtype));
    memcpy(y, x, (size_t)(rows * H * 3 * D * size_of(dtype)));
    chatglm_rotary(y, c, s, dtype, rows, H, D, parts, threads);
    for (int64_t i = 0; i < rows * H * 3 * D; i++) {
        int64_t row = i / (3 * D * H), d = i % D, half = D / parts / 2, is_second = d / half % 2;
        double expected = element(x, dtype, i), sine = element(s, dtype, row * D + d);
        if (i / D % 3 < 2) { /* no value */
            double other = is_second ? element(x, dtype, i - half) : -element(x, dtype, i + half);
            expected = expected * element(c, dtype, row * D + d) + other * sine;
        }
        expect("rotary", element(y, dtype, i), expected, 0x1p-21 + fabs(expected) * 1.01 * rounding[dtype]);
    }
    free(x), free(c), free(s), free(y);
}

static void gelu(int64_t count, int dtype, int threads) {
    void *x = filled(dtype, count, 8), *y = fresh(count * size_of(dtype));
    memcpy(y, x, (size_t)(count * size_of(dtype)));
    chatglm_gelu(y, dtype, count, threads);
    for (int64_t i = 0; i < count; i++) {
        double value = element(x, dtype, i), u = 1.5957691216057308 * (value + 0.044715 * value * value * value);
        double expected = value / (1 + exp(-u));
        expect("gelu", element(y, dtype, i), expected, 1e-6 + fabs(expected) * 1.01 * rounding[dtype]);
    }
    free(x), free(y);
}

int main(void) {
    static const int64_t Ms[] = {1, 2, 3, 7, 16, 33}, Ns[] = {1, 5, 33}, Ks[] = {2, 30, 64, 360, 2114};
    if (!chatglm_start()) return 77;
    for (int i = 0; i < 6; i++)
        for (int n = 0; n < 3; n++)
            for (int k = 0; k < 5; k++)
                linear(Ms[i], Ns[n], Ks[k], (i + k) % 2 ? 8 : 4, (i + n + k) % 3, n % 2, 1 + (i + n) % 3);
    for (int dtype = 0; dtype < 3; dtype++) {
        linear(1, 9, 1, 8, dtype, 1, 2), linear(5, 9, 15, 8, dtype, 1, 2), linear(515, 3, 40, 8, dtype, 0, 2);
        linear(9, 33, 1088, 8, dtype, 0, 1), linear(20, 65, 1088, 8, dtype, 0, 1);
        for (int weight = 1; weight < 3; weight++)
            half(1, 9, 130, dtype, weight, 1), half(3, 5, 15, dtype, weight, 2), half(8, 2, 1, dtype, weight, 4);
        attend(2, 3, 1, 1, 16, dtype, 1), attend(1, 2, 1, 37, 48, dtype, 2), attend(2, 1, 1, 300, 256, dtype, 3);
        attend(2, 3, 2, 1, 16, dtype, 1), attend(1, 2, 19, 37, 48, dtype, 2), attend(2, 1, 8, 70, 256, dtype, 3);
        rotate(3, 2, 16, 2, dtype, 1), rotate(2, 1, 6, 1, dtype, 2), rotate(1, 3, 256, 2, dtype, 4);
        gelu(1, dtype, 1), gelu(1500, dtype, 2), gelu(1024, dtype, 3);
    }
    printf("%s: %d wrong\n", chatglm_instructions(), wrong);
    return wrong != 0;
}
