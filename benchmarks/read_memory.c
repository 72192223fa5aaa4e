/* How fast threads read memory: what a product of one row is bound by. */
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <omp.h>
static uint64_t* memory;
static int64_t words;
/* Fill `bytes` of memory in pages of 2 MiB, so that every page exists. */
int prepare(int64_t bytes, int threads) {
    words = bytes / 8;
    memory = aligned_alloc(1 << 21, bytes);
    if (!memory) return 1;
    madvise(memory, bytes, MADV_HUGEPAGE);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i++) memory[i] = (uint64_t)i * 0x9e3779b97f4a7c15;
    return 0;
}
/* Read all of it once, a contiguous part in each thread. */
uint64_t read_all(int threads) {
    uint64_t sum = 0;
#pragma omp parallel num_threads(threads) reduction(+ : sum)
    {
        int64_t part = words / omp_get_num_threads(), first = part * omp_get_thread_num();
        uint64_t own[32] = {0};
        for (int64_t i = first; i + 32 <= first + part; i += 32) {
            for (int line = 0; line < 4; line++) __builtin_prefetch(memory + i + 128 + 8 * line);
            for (int j = 0; j < 32; j++) own[j] += memory[i + j];
        }
        for (int j = 0; j < 32; j++) sum += own[j];
    }
    return sum;
}
