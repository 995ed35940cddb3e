/* AdamW of many runs, each with its own hyperparameters, clipped by the global norm of its own gradients.

   Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW computes it. A step is the reading and writing of memory,
   so every number is touched once: clipping is a factor of the gradient on its way. What comes before is the norm, a
   reading of the gradients, most of which the caches still hold when the step follows.

   What stays true: a number of a run comes from that run's own numbers by the same operations in the same order,
   whatever else is stepped and however many threads share the work. Sums of squares are sums of blocks, which begin at
   multiples of BLOCK and are added up from the first to the last, all in double precision.

   Shape letters: S runs, P numbers of a row, B blocks of a row, C pieces of rows that are stepped. Needs AVX2 and
   FMA. */

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

enum { LANES = 8, BLOCK = 1 << 14 };
#define ALWAYS static inline __attribute__((always_inline))
static const double CLIP_EPS = 1e-6; /* as torch.nn.utils.clip_grad_norm_ */

/* Rows [P] of a run: their addresses, and P. Its pieces begin at the first_piece of all and end before the last. */
struct rows {
    float *param, *grad, *m, *v;
    int64_t num, first_piece, last_piece;
};

/* What a run is stepped with: AdamW's numbers as they are multiplied with, and the norm beyond which gradients are
   clipped (0: never). */
struct numbers {
    double decay, step_size, beta1, beta2, rest1, rest2, per_root_bias, eps, clip;
};

/* The first `count` lanes; others are neither read nor written. */
ALWAYS __m256i first(int64_t count) {
    static const int32_t ones[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + LANES - (count < LANES ? count : LANES)));
}

ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

ALWAYS void add_squares(__m256 g, __m256d *low, __m256d *high) {
    __m256d near = _mm256_cvtps_pd(_mm256_castps256_ps128(g)), far = _mm256_cvtps_pd(_mm256_extractf128_ps(g, 1));
    *low = _mm256_fmadd_pd(near, near, *low);
    *high = _mm256_fmadd_pd(far, far, *high);
}

/* The sum of the squares of up to BLOCK numbers. */
static double squares_of(const float *g, int64_t num) {
    __m256d a = _mm256_setzero_pd(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 2 * LANES <= num; i += 2 * LANES) {
        add_squares(_mm256_loadu_ps(g + i), &a, &b);
        add_squares(_mm256_loadu_ps(g + i + LANES), &c, &d);
    }
    for (; i < num; i += LANES) add_squares(_mm256_maskload_ps(g + i, first(num - i)), &a, &b);
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_add_pd(a, b), _mm256_add_pd(c, d)));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

struct factors {
    __m256 grad, decay, step_size, beta1, beta2, rest1, rest2, per_root_bias, eps;
};

static struct factors factors_of(const struct numbers *n, double norm) {
    int is_clipped = n->clip > 0 && norm + CLIP_EPS > n->clip;
    double grad = is_clipped ? n->clip / (norm + CLIP_EPS) : 1.0;
    struct factors f = {
        _mm256_set1_ps(grad), _mm256_set1_ps(n->decay), _mm256_set1_ps(n->step_size), _mm256_set1_ps(n->beta1),
        _mm256_set1_ps(n->beta2), _mm256_set1_ps(n->rest1), _mm256_set1_ps(n->rest2),
        _mm256_set1_ps(n->per_root_bias), _mm256_set1_ps(n->eps),
    };
    return f;
}

/* Eight numbers: the new moments, and what the parameters become. */
ALWAYS __m256 stepped(__m256 param, __m256 grad, __m256 *m, __m256 *v, struct factors f) {
    __m256 g = _mm256_mul_ps(grad, f.grad);
    *m = _mm256_fmadd_ps(f.beta1, *m, _mm256_mul_ps(f.rest1, g));
    *v = _mm256_fmadd_ps(f.beta2, *v, _mm256_mul_ps(_mm256_mul_ps(f.rest2, g), g));
    __m256 root = _mm256_fmadd_ps(_mm256_sqrt_ps(*v), f.per_root_bias, f.eps);
    __m256 change = _mm256_div_ps(_mm256_mul_ps(f.step_size, *m), root);
    return _mm256_fmsub_ps(param, f.decay, change);
}

static void step(struct rows r, int64_t start, int64_t end, struct factors f) {
    int64_t i = start;
    for (; i + LANES <= end; i += LANES) {
        __m256 m = _mm256_loadu_ps(r.m + i), v = _mm256_loadu_ps(r.v + i);
        __m256 param = stepped(_mm256_loadu_ps(r.param + i), _mm256_loadu_ps(r.grad + i), &m, &v, f);
        _mm256_storeu_ps(r.m + i, m);
        _mm256_storeu_ps(r.v + i, v);
        _mm256_storeu_ps(r.param + i, param);
    }
    if (i < end) {
        __m256i rest = first(end - i);
        __m256 m = _mm256_maskload_ps(r.m + i, rest), v = _mm256_maskload_ps(r.v + i, rest);
        __m256 param = stepped(_mm256_maskload_ps(r.param + i, rest), _mm256_maskload_ps(r.grad + i, rest), &m, &v, f);
        _mm256_maskstore_ps(r.m + i, rest, m);
        _mm256_maskstore_ps(r.v + i, rest, v);
        _mm256_maskstore_ps(r.param + i, rest, param);
    }
}

/* One run. Returns its norm; where that isn't finite nothing is changed. Squares are as finite as in single precision,
   which the second moments have. pieces [C, 2]: where they begin and end. sums [B]: room. */
static double step_run(struct rows r, const struct numbers *n, const int64_t *pieces, double *sums, int num_threads) {
    int64_t num_blocks = (r.num + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t b = 0; b < num_blocks; b++) sums[b] = squares_of(r.grad + b * BLOCK, least(BLOCK, r.num - b * BLOCK));
    double sum = 0;
    for (int64_t b = 0; b < num_blocks; b++) sum += sums[b];
    if (sum > FLT_MAX) return INFINITY;
    double norm = sqrt(sum);
    if (!isfinite(norm)) return norm;
    struct factors f = factors_of(n, norm);
    for (int64_t c = r.first_piece; c < r.last_piece; c++) {
        int64_t start = pieces[2 * c], end = pieces[2 * c + 1];
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
        for (int64_t at = start; at < end; at += BLOCK) step(r, at, least(end, at + BLOCK), f);
    }
    return norm;
}

/* Of the runs [S] the first num_whole are taken by one thread each, the others by all threads together. norms [S]:
   out. sums [S, sums_stride]: room, sums_stride at least P / BLOCK rounded up. */
void step_runs(int64_t num_runs, int64_t num_whole, const struct rows *rows, const struct numbers *numbers,
               const int64_t *pieces, double *norms, double *sums, int64_t sums_stride, int num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1 && num_whole > 1)
    for (int64_t s = 0; s < num_whole; s++)
        norms[s] = step_run(rows[s], numbers + s, pieces, sums + s * sums_stride, 1);
    for (int64_t s = num_whole; s < num_runs; s++)
        norms[s] = step_run(rows[s], numbers + s, pieces, sums + s * sums_stride, num_threads);
}
