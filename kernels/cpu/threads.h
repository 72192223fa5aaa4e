#pragma once

/* ---- Threads ---- */

#ifdef _OPENMP
static int64_t thread_number(void) { return omp_get_thread_num(); }
static int64_t thread_count(void) { return omp_get_num_threads(); }
#else
static int64_t thread_number(void) { return 0; }
static int64_t thread_count(void) { return 1; }
#endif

/* As many threads as there is work for, `threads` at most: to call one takes as long as some 100,000 products. */
static int of_threads(int threads, int64_t products) { return (int)least(threads, 1 + products / (1 << 18)); }

/* Of `count` things, those that this thread does. */
static int64_t part_begin(int64_t count) { return count * thread_number() / thread_count(); }
static int64_t part_end(int64_t count) { return count * (thread_number() + 1) / thread_count(); }

/* Whether the instructions this was compiled for may be used: 0 if the system refuses the matrix unit. */
int chatglm_start(void) {
#if defined(AMX) && !defined(EMULATE_AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 1;
#endif
}

const char* chatglm_instructions(void) { return INSTRUCTIONS; }
