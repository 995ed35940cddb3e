/* The adapters of a training pass, forward and backward, in one group of linear layers: all segments in one call.

   forward    u = x A', y_l += s_l u_l B_l'
   backward   g_l = s_l dy_l B_l, dB_l += s_l dy_l' u_l, dx += g A, dA += g' x

   A rank is narrow, so every product has one short side. It is kept in registers or in the first cache, and the long
   side goes by in blocks of WIDE columns and DEEP rows. Where rows lie so far apart that they would share few places of
   a cache, a block is copied together first, once for both products that need it: dy for g and dB, x for dA. What comes
   next is fetched while a block is computed, since matrices of many runs are in no cache.

   What stays true: a number of y, dx or a gradient is made by the same operations in the same order whatever else is in
   the pass and however many threads share the work. Sums over outputs are cut at multiples of CHUNK into parts, which
   are added one after another; sums over rows at multiples of DEEP from the beginning of a range of live rows. Segments
   that add to one gradient do so in their order.

   Shape letters: S segments, L layers of a group (which share x), N rows of a segment, M rows of all segments or of
   their live ranges, I inputs, O outputs of a layer, R rank, K = L · R, C chunks of all layers' outputs. All
   matrices are float32 and row by row: A [K, I], B of a layer [O, R]. I, O and R are multiples of LANES. WIDE, DEEP and
   CHUNK are compiled_segments.py's. Needs AVX2 and FMA. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 8, TALL = 6, AHEAD = 64 };
extern int omp_get_thread_num(void);
#define ALWAYS static inline __attribute__((always_inline))

/* Rows of floats; `step` counts elements from one to the next. */
struct rows {
    float *at;
    int64_t step;
};

ALWAYS struct rows part(struct rows of, int64_t row, int64_t column) {
    return (struct rows){of.at + row * of.step + column, of.step};
}

ALWAYS int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

ALWAYS void fetch(const float *at) { _mm_prefetch((const char *)at, _MM_HINT_T0); }

/* c += scale · a b of num rows and `vectors` times eight columns, both known to the compiler. a's element of a row and a
   depth is at row · down + depth · along. `ahead` columns further in c is what will be wanted next. */
ALWAYS void tile(int num, int vectors, int64_t depth, const float *a, int64_t down, int64_t along, struct rows b,
                 struct rows c, float scale, int64_t ahead) {
    __m256 sums[2 * TALL][2], scales = _mm256_set1_ps(scale);
#pragma GCC unroll 12
    for (int i = 0; i < num; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[i][j] = _mm256_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        __m256 own[2];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) own[j] = _mm256_loadu_ps(b.at + k * b.step + j * LANES);
#pragma GCC unroll 12
        for (int i = 0; i < num; i++) {
            __m256 factor = _mm256_broadcast_ss(a + i * down + k * along);
#pragma GCC unroll 2
            for (int j = 0; j < vectors; j++) sums[i][j] = _mm256_fmadd_ps(factor, own[j], sums[i][j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < num; i++) {
        float *place = c.at + i * c.step;
        fetch(place + ahead);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            __m256 sum = _mm256_fmadd_ps(sums[i][j], scales, _mm256_loadu_ps(place + j * LANES));
            _mm256_storeu_ps(place + j * LANES, sum);
        }
    }
}

ALWAYS void column(int vectors, int64_t num, int64_t depth, const float *a, int64_t down, int64_t along, struct rows b,
                   struct rows c, float scale, int64_t ahead) {
    int64_t i = 0;
#define TILE(rows) tile(rows, vectors, depth, a + i * down, down, along, b, part(c, i, 0), scale, ahead)
    if (vectors == 1)
        for (; i + 2 * TALL <= num; i += 2 * TALL) TILE(2 * TALL);
    for (; i + TALL <= num; i += TALL) TILE(TALL);
    switch (num - i) {
    case 5: TILE(5); break;
    case 4: TILE(4); break;
    case 3: TILE(3); break;
    case 2: TILE(2); break;
    case 1: TILE(1); break;
    }
#undef TILE
}

ALWAYS void columns(int64_t num, int64_t width, int64_t depth, const float *a, int64_t down, int64_t along,
                    struct rows b, struct rows c, float scale, int64_t ahead) {
    int64_t j = 0;
    for (; j + 2 * LANES <= width; j += 2 * LANES)
        column(2, num, depth, a, down, along, part(b, 0, j), part(c, 0, j), scale, ahead);
    if (j < width) column(1, num, depth, a, down, along, part(b, 0, j), part(c, 0, j), scale, ahead);
}

/* c [num, width] += scale · a b, with a [num, depth] and b [depth, width], a few rows after another, each from its
   first column to its last: c is large, and read as it lies. */
static void add_by_rows(int64_t num, int64_t width, int64_t depth, struct rows a, struct rows b, struct rows c,
                        float scale) {
    for (int64_t i = 0; i < num; i += TALL) {
        int64_t own = least(TALL, num - i);
        for (int64_t j = 0; j < width; j += 2 * LANES) {
            const float *from = part(a, i, 0).at;
            if (j + 2 * LANES > width)
                column(1, own, depth, from, a.step, 1, part(b, 0, j), part(c, i, j), scale, AHEAD);
            else
                column(2, own, depth, from, a.step, 1, part(b, 0, j), part(c, i, j), scale, AHEAD);
        }
    }
}

/* The same, a few columns after another: b is read as it lies, and c is small. */
static void add_by_columns(int64_t num, int64_t width, int64_t depth, struct rows a, struct rows b, struct rows c) {
    columns(num, width, depth, a.at, a.step, 1, b, c, 1, 0);
}

/* c [num, width] += scale · a' b, with a [depth, num] and b [depth, width] */
static void add_turned(int64_t num, int64_t width, int64_t depth, struct rows a, struct rows b, struct rows c,
                       float scale, int64_t ahead) {
    columns(num, width, depth, a.at, 1, a.step, b, c, scale, ahead);
}

/* Of num rows of x (1 or 3, known to the compiler) and four rows of A: their products, into four columns of u. */
ALWAYS void dots(int num, int64_t inputs, struct rows x, const float *a, struct rows u) {
    __m256 sums[3][4];
#pragma GCC unroll 3
    for (int i = 0; i < num; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sums[i][j] = _mm256_setzero_ps();
    for (int64_t k = 0; k < inputs; k += LANES) {
        __m256 own[3];
#pragma GCC unroll 3
        for (int i = 0; i < num; i++) own[i] = _mm256_loadu_ps(x.at + i * x.step + k);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m256 row = _mm256_loadu_ps(a + j * inputs + k);
#pragma GCC unroll 3
            for (int i = 0; i < num; i++) sums[i][j] = _mm256_fmadd_ps(own[i], row, sums[i][j]);
        }
    }
#pragma GCC unroll 3
    for (int i = 0; i < num; i++) {
        __m256 low = _mm256_hadd_ps(sums[i][0], sums[i][1]), high = _mm256_hadd_ps(sums[i][2], sums[i][3]);
        __m256 halves = _mm256_hadd_ps(low, high);
        _mm_storeu_ps(u.at + i * u.step,
                      _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
    }
}

/* u = x A' */
static void shrink(int64_t num, int64_t num_k, int64_t inputs, struct rows x, const float *a, struct rows u) {
    int64_t n = 0;
    for (; n + 3 <= num; n += 3)
        for (int64_t k = 0; k < num_k; k += 4) dots(3, inputs, part(x, n, 0), a + k * inputs, part(u, n, k));
    for (; n < num; n++)
        for (int64_t k = 0; k < num_k; k += 4) dots(1, inputs, part(x, n, 0), a + k * inputs, part(u, n, k));
}

/* to [8, 8], in rows of CHUNK, = from', whose rows lie one after another, `width` long */
ALWAYS void turn(const float *from, int64_t width, float *to) {
    __m256 r[LANES];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const float *place = from + i * width + 4 * half;
            __m256 low = _mm256_castps128_ps256(_mm_loadu_ps(place));
            r[i + 4 * half] = _mm256_insertf128_ps(low, _mm_loadu_ps(place + 4 * width), 1);
        }
#pragma GCC unroll 2
    for (int i = 0; i < LANES; i += 4) {
        __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
        __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
        _mm256_storeu_ps(to + (i + 0) * CHUNK, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(to + (i + 1) * CHUNK, _mm256_shuffle_ps(a, c, 0xEE));
        _mm256_storeu_ps(to + (i + 2) * CHUNK, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(to + (i + 3) * CHUNK, _mm256_shuffle_ps(b, d, 0xEE));
    }
}

ALWAYS void fetch_rows_of_b(const float *b, int64_t rank) {
    for (int64_t i = 0; i < WIDE * rank; i += 2 * LANES) _mm_prefetch((const char *)(b + i), _MM_HINT_T1);
}

/* y += scale · u B' */
static void expand(int64_t num, int64_t outputs, int64_t rank, float scale, struct rows u, const float *b,
                   struct rows y, float *room) {
    struct rows turned = {room, CHUNK};
    for (int64_t o = 0; o < outputs; o += CHUNK) {
        int64_t width = least(CHUNK, outputs - o);
        for (int64_t j = 0; j < width; j += LANES)
            for (int64_t r = 0; r < rank; r += LANES) turn(b + (o + j) * rank + r, rank, part(turned, r, j).at);
        add_by_rows(num, width, rank, u, turned, part(y, 0, o), scale);
    }
}

ALWAYS struct rows together(int64_t num, int64_t width, struct rows from, float *room) {
    for (int64_t i = 0; i < num; i++)
        for (int64_t j = 0; j < width; j += LANES) {
            const float *place = from.at + i * from.step + j;
            if (j % (2 * LANES) == 0) fetch(place + WIDE);
            _mm256_storeu_ps(room + i * WIDE + j, _mm256_loadu_ps(place));
        }
    return (struct rows){room, WIDE};
}

/* A chunk of a layer's outputs: g = dy B, and dB += scale · dy' u. */
static void output_grads(int64_t num, int64_t outputs, int64_t rank, float scale, struct rows dy, struct rows u,
                         const float *b, float *db, struct rows g, float *room) {
    for (int64_t n = 0; n < num; n++) memset(g.at + n * g.step, 0, rank * sizeof(float));
    for (int64_t n = 0; n < num; n += DEEP)
        for (int64_t o = 0; o < outputs; o += WIDE) {
            int64_t depth = least(DEEP, num - n), width = least(WIDE, outputs - o);
            fetch_rows_of_b(b + (o + width) * rank, rank);
            struct rows block = together(depth, width, part(dy, n, o), room);
            add_by_columns(depth, rank, width, block, (struct rows){(float *)b + o * rank, rank}, part(g, n, 0));
            add_turned(width, rank, depth, block, part(u, n, 0), (struct rows){db + o * rank, rank}, scale,
                       WIDE * rank);
        }
}

/* places [S, 1 + L]: the addresses of A and of each B. scales [S, L]. widths [L]: outputs of each layer. */
struct crowd {
    int64_t num_layers, inputs, rank, num_threads;
    const int64_t *widths, *places;
    const float *scales;
};

ALWAYS const int64_t *of(const int64_t *places, const struct crowd *crowd, int64_t s) {
    return places + s * (1 + crowd->num_layers);
}

/* Rows of a segment: where they begin in the pass and in u. */
struct block {
    int64_t segment, num, in_pass, in_u;
};

static void add_block(const struct crowd *crowd, struct block own, struct rows x, struct rows y, struct rows u,
                      float *room) {
    const int64_t *places = of(crowd->places, crowd, own.segment);
    int64_t rank = crowd->rank;
    struct rows u_NK = part(u, own.in_u, 0);
    shrink(own.num, crowd->num_layers * rank, crowd->inputs, part(x, own.in_pass, 0), (const float *)places[0], u_NK);
    if (!y.at) return;
    struct rows y_NO = part(y, own.in_pass, 0);
    for (int64_t l = 0; l < crowd->num_layers; y_NO.at += crowd->widths[l], l++)
        expand(own.num, crowd->widths[l], rank, crowd->scales[own.segment * crowd->num_layers + l],
               part(u_NK, 0, l * rank), (const float *)places[1 + l], y_NO, room);
}

/* u [M, K] = x A', and y += its part, unless y is null. room [threads, room_step], with room_step at least CHUNK · R.
   Steps count elements. */
void add_segments(const struct crowd *crowd, int64_t num_blocks, const struct block *blocks, float *x, int64_t x_step,
                  float *y, int64_t y_step, float *u, int64_t u_step, float *room, int64_t room_step) {
    int threads = (int)crowd->num_threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && num_blocks > 1)
    for (int64_t i = 0; i < num_blocks; i++)
        add_block(crowd, blocks[i], (struct rows){x, x_step}, (struct rows){y, y_step}, (struct rows){u, u_step},
                  room + omp_get_thread_num() * room_step);
}

/* A range of live rows: where it begins in the pass, in u and among all live rows. */
struct span {
    int64_t segment, num, in_pass, in_u, alone;
};

/* spans: those of segment s are numbers starts[s] .. starts[s + 1] - 1. Segments that add to the same gradients are
   one owner: those of owner w are owned[owners[w]] .. owned[owners[w + 1] - 1], in their order; of outputs (dB) and of
   inputs (dA). grads: as `places` of the crowd. */
struct live {
    int64_t num_rows, num_spans;
    const struct span *spans;
    const int64_t *starts, *grads;
    int64_t num_output_owners;
    const int64_t *output_owners, *output_owned;
    int64_t num_input_owners;
    const int64_t *input_owners, *input_owned;
};

static int64_t num_chunks(int64_t width) { return (width + CHUNK - 1) / CHUNK; }

static int64_t num_output_chunks(const struct crowd *crowd) {
    int64_t num = 0;
    for (int64_t l = 0; l < crowd->num_layers; l++) num += num_chunks(crowd->widths[l]);
    return num;
}

/* Chunk c of the outputs of an owner's segments; g_CMR has a part of g for each chunk. */
static void add_output_chunk(const struct crowd *crowd, const struct live *live, int64_t w, int64_t c, struct rows dy,
                             struct rows u, float *g_CMR, float *room) {
    int64_t l = 0, before = 0, first = c, rank = crowd->rank;
    for (; first >= num_chunks(crowd->widths[l]); before += crowd->widths[l], l++) first -= num_chunks(crowd->widths[l]);
    first *= CHUNK;
    int64_t width = least(CHUNK, crowd->widths[l] - first);
    struct rows g_MR = {g_CMR + c * live->num_rows * rank, rank};
    for (int64_t i = live->output_owners[w]; i < live->output_owners[w + 1]; i++) {
        int64_t s = live->output_owned[i];
        const float *b = (const float *)of(crowd->places, crowd, s)[1 + l] + first * rank;
        float *db = (float *)of(live->grads, crowd, s)[1 + l] + first * rank;
        for (int64_t p = live->starts[s]; p < live->starts[s + 1]; p++) {
            struct span own = live->spans[p];
            output_grads(own.num, width, rank, crowd->scales[s * crowd->num_layers + l],
                         part(dy, own.in_pass, before + first), part(u, own.in_u, l * rank), b, db,
                         part(g_MR, own.alone, 0), room);
        }
    }
}

/* g [M, K]: the chunks of each layer added up, times its scale. */
static void gather_chunks(const struct crowd *crowd, const struct live *live, struct span own, const float *g_CMR,
                          struct rows g) {
    int64_t rank = crowd->rank, whole = live->num_rows * rank;
    for (int64_t l = 0; l < crowd->num_layers; g_CMR += num_chunks(crowd->widths[l]) * whole, l++) {
        __m256 scale = _mm256_set1_ps(crowd->scales[own.segment * crowd->num_layers + l]);
        for (int64_t n = own.alone; n < own.alone + own.num; n++)
            for (int64_t r = 0; r < rank; r += LANES) {
                __m256 sum = _mm256_loadu_ps(g_CMR + n * rank + r);
                for (int64_t c = 1; c < num_chunks(crowd->widths[l]); c++)
                    sum = _mm256_add_ps(sum, _mm256_loadu_ps(g_CMR + c * whole + n * rank + r));
                _mm256_storeu_ps(part(g, n, l * rank + r).at, _mm256_mul_ps(sum, scale));
            }
    }
}

/* Columns of the inputs of one range of live rows: dA += g' x. */
static void input_grads(int64_t num, int64_t width, int64_t num_k, struct rows g, struct rows da, struct rows x,
                        float *room) {
    for (int64_t n = 0; n < num; n += DEEP) {
        int64_t depth = least(DEEP, num - n);
        add_turned(num_k, width, depth, part(g, n, 0), together(depth, width, part(x, n, 0), room), da, 1, WIDE);
    }
}

/* Chunk c of the inputs of an owner's segments. */
static void add_input_chunk(const struct crowd *crowd, const struct live *live, int64_t w, int64_t c, struct rows x,
                            struct rows dx, struct rows g, float *room) {
    int64_t num_k = crowd->num_layers * crowd->rank, inputs = crowd->inputs;
    int64_t first = c * CHUNK, width = least(CHUNK, inputs - first);
    struct rows own_a = {room + DEEP * WIDE, CHUNK};
    for (int64_t j = live->input_owners[w]; j < live->input_owners[w + 1]; j++) {
        int64_t s = live->input_owned[j];
        if (live->starts[s] == live->starts[s + 1]) continue;
        struct rows a = {(float *)of(crowd->places, crowd, s)[0] + first, inputs};
        struct rows da = {(float *)of(live->grads, crowd, s)[0] + first, inputs};
        for (int64_t k = 0; k < num_k; k++) memcpy(part(own_a, k, 0).at, part(a, k, 0).at, width * sizeof(float));
        for (int64_t p = live->starts[s]; p < live->starts[s + 1]; p++) {
            struct span own = live->spans[p];
            struct rows g_NK = part(g, own.alone, 0), x_NI = part(x, own.in_pass, first);
            add_by_rows(own.num, width, num_k, g_NK, own_a, part(dx, own.in_pass, first), 1);
            for (int64_t i = 0; i < width; i += WIDE)
                input_grads(own.num, least(WIDE, width - i), num_k, g_NK, part(da, 0, i), part(x_NI, 0, i), room);
        }
    }
}

/* dA, dB and dx of the live rows, in place. u [., K] as `add_segments` made it. g_CMR [chunks, M, R] and g [M, K] are
   room for M live rows; room [threads, room_step] also, with room_step at least WIDE · DEEP + CHUNK · K. */
void add_grads(const struct crowd *crowd, const struct live *live, float *x, int64_t x_step, float *dy, int64_t dy_step,
               float *dx, int64_t dx_step, float *u, int64_t u_step, float *g_CMR, float *g, float *room,
               int64_t room_step) {
    int threads = (int)crowd->num_threads;
    int64_t num_c = num_output_chunks(crowd), num_i = num_chunks(crowd->inputs);
    struct rows g_MK = {g, crowd->num_layers * crowd->rank};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *own = room + omp_get_thread_num() * room_step;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < live->num_output_owners * num_c; i++)
            add_output_chunk(crowd, live, i / num_c, i % num_c, (struct rows){dy, dy_step}, (struct rows){u, u_step},
                             g_CMR, own);
#pragma omp for
        for (int64_t p = 0; p < live->num_spans; p++) gather_chunks(crowd, live, live->spans[p], g_CMR, g_MK);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < live->num_input_owners * num_i; i++)
            add_input_chunk(crowd, live, i / num_i, i % num_i, (struct rows){x, x_step}, (struct rows){dx, dx_step},
                            g_MK, own);
    }
}
