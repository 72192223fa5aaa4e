/* Linear layers with int8 or int4 weights: y [M, N] = x [M, K] · (scale [N] · weight [N, K])ᵀ + bias [N].

   One row goes to linear_one_row.h. Several rows, at most M_AT_ONCE at a time, are split into limbs by all threads;
   after a barrier each thread multiplies them by its own range of output features, through an engine of tiles/.
   Memory, aligned to 64 bytes: for each thread sums and a panel; for all limbs, their scales, initial sums. */
#pragma once

enum { M_AT_ONCE = 512 /* rows of x that are limbs at the same time */ };
_Static_assert(M_AT_ONCE % (2 * PADDED_M) == 0, "parts of an activation are whole tiles");

/* y[:, begin:end] for several rows. `sums` holds [chunk / tile_n][padded_M / PADDED_M][TILE_N][PADDED_M] floats. */
static void multiply_rows(const struct job* j, int64_t begin, int64_t end, int64_t chunk,
                          float (*sums)[TILE_N][PADDED_M], void* panel) {
    const int64_t m_tiles = j->padded_M / PADDED_M, tile_n = j->tile_n;
    float scale[CHUNK], bias[CHUNK], lines[PADDED_M][CHUNK];
    for (int64_t n0 = begin; n0 < end; n0 += chunk) {
        int64_t height = min_i64(chunk, end - n0);
        memset(sums, 0, (size_t)((height + tile_n - 1) / tile_n * m_tiles) * sizeof *sums);
        ENGINE(j, multiply_chunk)(j, n0, height, end, chunk, sums, panel);
        read_scale_and_bias(j, n0, height, scale, bias);
        for (int64_t m0 = 0; m0 < j->M; m0 += PADDED_M) { /* sums are [n, m], y is [m, n] */
            int64_t n = 0;
            for (; CAN_TRANSPOSE && j->width == PADDED_M && n + FLOATS <= height; n += FLOATS) {
                const float* rows[FLOATS];
                for (int i = 0; i < FLOATS; i++)
                    rows[i] = sums[(n + i) / tile_n * m_tiles + m0 / PADDED_M][(n + i) % tile_n];
                transpose(rows, load(scale + n), load(bias + n), lines[0] + n, CHUNK);
            }
            for (; n < height; n++) {
                const float* row = sums[n / tile_n * m_tiles + m0 / PADDED_M][n % tile_n];
                for (int i = 0; i < j->width; i++) lines[i][n] = row[i * PADDED_M / j->width] * scale[n] + bias[n];
            }
            for (int64_t m = m0; m < min_i64(m0 + PADDED_M, j->M); m++)
                write_floats(lines[m - m0], height, j->x_dtype, j->y, m * j->N + n0);
        }
    }
}

int chatglm_linear(const void* x, int x_dtype, const int8_t* weight, int bits, const void* scale, int scale_dtype,
                   const void* bias, int bias_dtype, void* y, int64_t M, int64_t N, int64_t K, int threads) {
    int one = M == 1;
    threads = threads_for(threads, M * N * K);
    for (int64_t m = 0; m < M; m += M_AT_ONCE) { /* rows that are limbs at the same time */
        struct job j = {
            .x = (const char*)x + m * K * size_of(x_dtype),
            .x_dtype = x_dtype,
            .weight = weight,
            .bits = bits,
            .scale = scale,
            .scale_dtype = scale_dtype,
            .bias = bias,
            .bias_dtype = bias_dtype,
            .y = (char*)y + m * N * size_of(x_dtype),
            .M = min_i64(M - m, M_AT_ONCE),
            .N = N,
            .K = K,
            .width = PADDED_M,
            .tile_n = TILE_N,
            .padded_K = round_up(K, CACHE_LINE),
            .block = BLOCK,
        };
        struct plan plan = {0};
        j.pairs = HAS_PAIRS && j.M > PADDED_M && on_amd();
        if (one)
            j.padded_M = 1;
        else
            plan = ENGINE(&j, plan)(&j);
        int blocks = (int)((j.padded_K + j.block - 1) / j.block);
        size_t limb_size = one ? sizeof(limb_t) : LIMB_SIZE;
        j.planes = limb_count(x_dtype, limb_size);
        /* For each thread: sums and a panel. For all: limbs, their scales, initial sums. */
        size_t sums_size = one ? 0 : (size_t)(plan.chunk / j.tile_n * TILE_N * j.padded_M) * 4;
        size_t own_size = sums_size + plan.panel_size, all_own = (size_t)threads * own_size;
        size_t scale_size = (size_t)round_up(blocks * j.planes * j.padded_M * 4, 64);
        size_t start_size = one ? (size_t)(2 * blocks * j.planes * FLOATS) * 4 : 2 * scale_size;
        size_t limbs_size = (size_t)(j.planes * j.padded_M * j.padded_K) * limb_size;
        size_t beyond = CACHE_LINE * sizeof(limb_t); /* read after one row's limbs, and multiplied by zeros */
        size_t all = all_own + scale_size + start_size + limbs_size + beyond;
        char* memory = allocate((int64_t)all);
        if (!memory) return NO_MEMORY;
        j.limb_scale = (float*)(memory + all_own);
        j.start = (int32_t*)(memory + all_own + scale_size);
        char* limbs = memory + all_own + scale_size + start_size;
        if (one)
            j.row_limbs = (limb_t*)limbs;
        else
            j.limbs = limbs;
        memset(j.limb_scale, 0, scale_size); /* of the rows that pad M */
        if (one) {
            memset(limbs + limbs_size, 0, beyond);
            split_row(&j, blocks);
        }
#pragma omp parallel num_threads(threads)
        {
            int64_t tiles = (N + j.tile_n - 1) / j.tile_n;
            int64_t begin = part_begin(tiles) * j.tile_n, end = min_i64(part_end(tiles) * j.tile_n, N);
            if (one)
                multiply_row(&j, begin, end);
            else {
                char* own = memory + (size_t)thread_number() * own_size;
                int64_t parts = blocks * (j.padded_M / PADDED_M); /* also of those that pad M */
                for (int64_t i = part_begin(parts); i < part_end(parts); i++)
                    ENGINE(&j, split_rows)(&j, i / blocks * PADDED_M, i % blocks);
#pragma omp barrier
                start_tiles();
                multiply_rows(&j, begin, end, plan.chunk, (float (*)[TILE_N][PADDED_M])own, own + sums_size);
                stop_tiles();
            }
        }
        release(memory);
    }
    return OK;
}
