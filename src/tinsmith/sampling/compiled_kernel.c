/* y[t] += scale · B (A x[t]) for rows t of a batch, each with the adapter of its own sequence.

   With a row for each adapter this is the reading of A and B from memory, so that is what it is built for: every matrix
   is read once, where it lies, from its first number to its last, which is what a processor fetches ahead by itself.
   Rows of x and y are found by their numbers; nothing is gathered or copied.

   Both products are one: a matrix that lies row by row, times a vector. Eight of its rows are taken at a time. Each is
   multiplied lane by lane, and the eight sums over lanes come out side by side, as eight neighbouring numbers of the
   product. While eight rows of a matrix are in the first cache, every row of the batch that needs them takes its turn.

   What stays true: a number of y comes from its own row of x and its own adapter by the same operations in the same
   order, whatever else is in the batch and however many threads share the work: no neighbour changes a bit of it.

   Shape letters: S adapters, L layers of a group (which share x), N rows of the batch that have an adapter, I inputs,
   R rank, K = L · R, O outputs of all layers side by side. All matrices are float32: A [K, I], B of a layer
   [outputs, R], x [., I], y [., O]. Needs AVX2 and FMA. */

#include <immintrin.h>
#include <stdint.h>

enum { LANES = 8 };
#define ALWAYS static inline __attribute__((always_inline))

/* The first `count` lanes; others are neither read nor written. */
ALWAYS __m256i first(int count) {
    static const int32_t ones[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + LANES - count));
}

/* Eight sums whose total is row · v, of n numbers each. Two chains of additions, since one would wait for itself. */
ALWAYS __m256 lanes_of_dot(const float *row, const float *v, int n) {
    __m256 even = _mm256_setzero_ps(), odd = even;
    int i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        even = _mm256_fmadd_ps(_mm256_loadu_ps(row + i), _mm256_loadu_ps(v + i), even);
        odd = _mm256_fmadd_ps(_mm256_loadu_ps(row + i + LANES), _mm256_loadu_ps(v + i + LANES), odd);
    }
    if (i + LANES <= n) {
        even = _mm256_fmadd_ps(_mm256_loadu_ps(row + i), _mm256_loadu_ps(v + i), even);
        i += LANES;
    }
    if (i < n) {
        __m256i rest = first(n - i);
        odd = _mm256_fmadd_ps(_mm256_maskload_ps(row + i, rest), _mm256_maskload_ps(v + i, rest), odd);
    }
    return _mm256_add_ps(even, odd);
}

/* M v for eight rows of M [., n]. Where only `count` are left, lanes beyond them mean nothing. */
ALWAYS __m256 eight_dots(const float *m, int count, int n, const float *v) {
    __m256 d[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i++) d[i] = lanes_of_dot(m + (int64_t)(i < count ? i : 0) * n, v, n);
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(d[0], d[1]), _mm256_hadd_ps(d[2], d[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(d[4], d[5]), _mm256_hadd_ps(d[6], d[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

/* Rows of one adapter: `rows` are their numbers in x and y; u [num, u_stride] is room, K rounded up to eight. */
struct own {
    const int32_t *rows;
    int num;
    float *u;
    int64_t u_stride;
};

/* u = A x */
static void shrink(const float *a, int num_k, int inputs, const float *x, int64_t x_stride, struct own own) {
    for (int k = 0; k < num_k; k += LANES)
        for (int t = 0; t < own.num; t++) {
            const float *x_I = x + own.rows[t] * x_stride;
            _mm256_storeu_ps(own.u + t * own.u_stride + k, eight_dots(a + (int64_t)k * inputs, num_k - k, inputs, x_I));
        }
}

/* y += scale · B u, of one layer, whose part of u begins at its first_k */
ALWAYS void expand(const float *b, int width, int rank, float scale, int first_k, float *y, int64_t y_stride,
                   struct own own) {
    __m256 scales = _mm256_set1_ps(scale);
    for (int o = 0; o < width; o += LANES)
        for (int t = 0; t < own.num; t++) {
            const float *u_R = own.u + t * own.u_stride + first_k;
            float *place = y + own.rows[t] * y_stride + o;
            __m256 part = eight_dots(b + (int64_t)o * rank, width - o, rank, u_R);
            if (o + LANES <= width) {
                _mm256_storeu_ps(place, _mm256_fmadd_ps(part, scales, _mm256_loadu_ps(place)));
            } else {
                __m256i rest = first(width - o);
                __m256 sum = _mm256_fmadd_ps(part, scales, _mm256_maskload_ps(place, rest));
                _mm256_maskstore_ps(place, rest, sum);
            }
        }
}

/* widths [L]: outputs of each layer. places [S, 2 + L]: the rank, or 0 where the adapter has no such layers; the
   addresses of A and of each B. scales [S, L]. Adapter s has rows starts[s] .. starts[s + 1] - 1 of `rows` [N]. u
   [N, u_stride]: room, u_stride at least K rounded up to eight. Strides count elements. */
void add_adapters(int num_adapters, int num_layers, int inputs, const int32_t *widths, const int64_t *places,
                  int64_t places_stride, const float *scales, int64_t scales_stride, const int32_t *starts,
                  const int32_t *rows, float *u, int64_t u_stride, int num_threads, const float *x, int64_t x_stride,
                  float *y, int64_t y_stride) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1 && num_adapters > 1)
    for (int s = 0; s < num_adapters; s++) {
        const int64_t *place = places + s * places_stride;
        int rank = (int)place[0];
        if (!rank) continue;
        struct own own = {rows + starts[s], starts[s + 1] - starts[s], u + starts[s] * u_stride, u_stride};
        shrink((const float *)place[1], num_layers * rank, inputs, x, x_stride, own);
        float *y_l = y;
        for (int l = 0; l < num_layers; y_l += widths[l], l++) {
            const float *b = (const float *)place[2 + l];
            float scale = scales[s * scales_stride + l];
            int first_k = l * rank;
            if (rank == 16) /* the same, where the compiler knows how short the rows of B are */
                expand(b, widths[l], 16, scale, first_k, y_l, y_stride, own);
            else if (rank == 32)
                expand(b, widths[l], 32, scale, first_k, y_l, y_stride, own);
            else
                expand(b, widths[l], rank, scale, first_k, y_l, y_stride, own);
        }
    }
}
