/* Test double of AMX's intrinsics, of tiles of 16 rows of 64 bytes, for machines without a matrix unit. */
#pragma once

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_loadconfig
#undef _tile_release
#define _tile_zero emulated_zero /* clang's header has functions of these names */
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbssd emulated_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
static _Thread_local int32_t tile_memory[8][16][16];
static void _tile_zero(int t) { memset(tile_memory[t], 0, sizeof tile_memory[t]); }
static void _tile_loadd(int t, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(tile_memory[t][row], (const char*)from + row * stride, 64);
}
static void _tile_stored(int t, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy((char*)to + row * stride, tile_memory[t][row], 64);
}
static void _tile_dpbssd(int sum, int a, int b) {
    const int8_t *rows = (const int8_t*)tile_memory[a], *columns = (const int8_t*)tile_memory[b];
    for (int n = 0; n < 16; n++)
        for (int m = 0; m < 16; m++)
            for (int k = 0; k < 64; k++)
                tile_memory[sum][n][m] += rows[n * 64 + k] * columns[k / 4 * 64 + m * 4 + k % 4];
}
static void _tile_loadconfig(const void* config) { (void)config; }
static void _tile_release(void) {}

static int tiles_allowed(void) { return 1; }
