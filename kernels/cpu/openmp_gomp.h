/* OpenMP as clang calls it (__kmpc_*), over GCC's runtime (GOMP_*): the one that PyTorch loads on Linux. Only what the
   kernels use: parallel regions with num_threads, and barriers. */
#pragma once

#include <stdarg.h>

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier(void);

enum { MAX_SHARED = 32 }; /* variables that a region shares, at most */
struct region {
    void (*task)(int32_t* thread, int32_t* bound, ...);
    void* shared[MAX_SHARED];
};
static _Thread_local int32_t team_size; /* of the next region; 0: the runtime's choice */

static void run_region(void* data) {
    const struct region* r = data;
    void* const* s = r->shared;
    int32_t thread = omp_get_thread_num(), bound = 0;
    /* More arguments than the task takes do no harm: the caller removes them. */
    void (*task)(int32_t*, int32_t*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                 void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                 void*, void*, void*, void*, void*, void*) = (void*)r->task;
    task(&thread, &bound, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14],
         s[15], s[16], s[17], s[18], s[19], s[20], s[21], s[22], s[23], s[24], s[25], s[26], s[27], s[28], s[29], s[30],
         s[31]);
}

#define HIDDEN __attribute__((visibility("hidden"), used))
HIDDEN void __kmpc_fork_call(void* place, int32_t count, void (*task)(int32_t*, int32_t*, ...), ...) {
    struct region r = {.task = task};
    va_list given;
    (void)place;
    if (count > MAX_SHARED) abort();
    va_start(given, task);
    for (int32_t i = 0; i < count; i++) r.shared[i] = va_arg(given, void*);
    va_end(given);
    unsigned threads = (unsigned)team_size;
    team_size = 0;
    GOMP_parallel(run_region, &r, threads, 0);
}
HIDDEN void __kmpc_push_num_threads(void* place, int32_t thread, int32_t threads) {
    (void)place, (void)thread;
    team_size = threads;
}
HIDDEN int32_t __kmpc_global_thread_num(void* place) {
    (void)place;
    return omp_get_thread_num();
}
HIDDEN void __kmpc_barrier(void* place, int32_t thread) {
    (void)place, (void)thread;
    GOMP_barrier();
}
#undef HIDDEN
