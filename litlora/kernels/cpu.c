/* Products of a few rows with a frozen weight, which read it as it is stored, and its values.

   A token that is decoded reads every weight once: the fewer bytes, the sooner it is there, as long as the
   processor makes values of them as fast as the memory delivers. 32 values are made at a time, in registers.
   Sums are in fp32, and in the same order for one row as for several, so that a sequence of a batch gets
   what it gets alone.

   Nothing here checks sizes, allocates memory or fails: cpu.py sees to what is passed. */

#include <math.h>

#include "cpu_formats.h"
#include "cpu_groups.h"

#define TILE 512 /* values that wait in the first cache for several rows of x */
#define MOST_ROWS 16
#define MOST_RANK 128
#define MOST_HEADS 64     /* that share keys */
#define MOST_QUERIES 16384 /* their numbers together */
#define MOST_HEAD 512 /* numbers of one that turn */
#define TOKENS 64
#define PIECES 8 /* for each thread, of which those that are done sooner take more */
#define SMALL (1 << 16) /* of fewer numbers than so many, one thread computes */

/* A (rank, in) and Bt (rank, out) of an adapter; `in` and `out` are multiples of 8. */
struct update {
    const void *A, *Bt;
    int64_t in, rank, out;
    int dtype;
};

/* A linear layer: its weight, and perhaps a bias (rows), and of each row of x an update, if any, and its
   scale. */
struct part {
    const struct weight *weight;
    const float *bias;
    const struct update *const *updates;
    const float *scales;
    int number;
};

/* A token's queries (heads, key_size) and result (heads, value_size), and the keys and values (groups,
   tokens, size), each in a dtype; `sinks` (heads) in fp32, or none; `softcap` 0 for none. Strides of a
   head, of a group and of a token, in numbers. */
struct attention {
    const void *q, *k, *v;
    const float *sinks;
    void *y;
    int64_t heads, groups, tokens, key_size, value_size, q_stride;
    int64_t key_group, key_stride, value_group, value_stride;
    float scale, softcap;
    int query_dtype, dtype;
};

/* RMSNorm by the weight + `more`, if it has a weight. */
struct norm {
    const void *weight;
    float eps, more;
    int dtype;
};

typedef void (*some_rows)(
    const struct weight *, int64_t first, int64_t last, const float *x, int n, float *y);
typedef void (*some_values)(
    const struct weight *, int64_t first, int64_t last, int rounding, void *to, int dtype);

/* ---- what is done with the values of any format */

typedef void (*format)(const struct weight *, int64_t row, int64_t column, f32x8 v[4]);

static inline __attribute__((always_inline)) int64_t stored_row(const struct weight *w, int64_t row)
{
    return w->order ? w->order[row] : w->first + row;
}

static inline float sum_of(const f32x8 sums[4])
{
    f32x8 v = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

static inline __attribute__((always_inline)) void round_all_to(int dtype, f32x8 v[4])
{
    for (int k = 0; dtype != F32 && k < 4; k++)
        v[k] = rounded_to(v[k], dtype);
}

/* y (n, rows) = x Wᵀ for some rows of W; x (n, columns). */
static inline __attribute__((always_inline)) void multiply(
    format values_at, const struct weight *w, int64_t first, int64_t last, const float *x, int n, float *y)
{
    for (int64_t row = first; row < last; row++) {
        int64_t stored = stored_row(w, row);
        f32x8 sums[MOST_ROWS][4];
        memset(sums, 0, sizeof sums[0] * (size_t)n);
        if (n == 1) {
            f32x8 a = {0}, b = {0}, c = {0}, d = {0}, v[4];
            for (int64_t column = 0; column < w->columns; column += STEP) {
                values_at(w, stored, column, v);
                round_all_to(w->rounding, v);
                a = multiply_add(v[0], load(x + column), a);
                b = multiply_add(v[1], load(x + column + 8), b);
                c = multiply_add(v[2], load(x + column + 16), c);
                d = multiply_add(v[3], load(x + column + 24), d);
            }
            sums[0][0] = a, sums[0][1] = b, sums[0][2] = c, sums[0][3] = d;
        }
        for (int64_t start = 0; n > 1 && start < w->columns; start += TILE) {
            f32x8 tile[TILE / 8];
            int steps = (int)((w->columns - start < TILE ? w->columns - start : TILE) / STEP);
            for (int i = 0; i < steps; i++) {
                values_at(w, stored, start + i * STEP, tile + 4 * i);
                round_all_to(w->rounding, tile + 4 * i);
            }
            for (int r = 0; r < n; r++) {
                const float *own = x + r * w->columns + start;
                f32x8 a = sums[r][0], b = sums[r][1], c = sums[r][2], d = sums[r][3];
                for (int i = 0; i < steps; i++, own += STEP) {
                    const f32x8 *v = tile + 4 * i;
                    a = multiply_add(v[0], load(own), a), b = multiply_add(v[1], load(own + 8), b);
                    c = multiply_add(v[2], load(own + 16), c), d = multiply_add(v[3], load(own + 24), d);
                }
                sums[r][0] = a, sums[r][1] = b, sums[r][2] = c, sums[r][3] = d;
            }
        }
        for (int r = 0; r < n; r++)
            y[r * w->rows + row] = sum_of(sums[r]);
    }
}

/* Some rows of W into `to` (rows, columns), of a dtype, rounded to that of `rounding` first. */
static inline __attribute__((always_inline)) void write(
    format values_at, const struct weight *w, int64_t first, int64_t last, int rounding, void *to, int dtype)
{
    rounding = rounding == dtype ? F32 : rounding; /* once is enough */
    for (int64_t row = first; row < last; row++) {
        int64_t stored = stored_row(w, row);
        for (int64_t column = 0; column < w->columns; column += STEP) {
            int64_t place = row * w->columns + column;
            f32x8 v[4];
            values_at(w, stored, column, v);
            for (int k = 0; k < 4; k++)
                put(to, place + 8 * k, rounded_to(v[k], rounding), dtype);
        }
    }
}

#define FORMAT(name)                                                                             \
    static void name##_rows(                                                                     \
        const struct weight *w, int64_t first, int64_t last, const float *x, int n, float *y)    \
    {                                                                                            \
        multiply(name, w, first, last, x, n, y);                                                 \
    }                                                                                            \
    static void name##_values(                                                                   \
        const struct weight *w, int64_t first, int64_t last, int rounding, void *to, int dtype)  \
    {                                                                                            \
        write(name, w, first, last, rounding, to, dtype);                                        \
    }

#define EACH(do_it)                                                            \
    do_it(f32) do_it(bf16) do_it(f16) do_it(int8) do_it(e4m3) do_it(e5m2)      \
    do_it(four_bits) do_it(four_bits_nested) do_it(mxfp4)                      \
    do_it(packed2) do_it(packed3) do_it(packed4) do_it(packed8) do_it(signed8) \
    do_it(q8_0) do_it(q4_0) do_it(q4_1) do_it(q5_0) do_it(q5_1) do_it(q4_k) do_it(q5_k) do_it(q6_k)

EACH(FORMAT)

#define NAME(name) #name,
#define ROWS(name) name##_rows,
#define VALUES(name) name##_values,

static const char *const names[] = {EACH(NAME)};
static const some_rows rows_of[] = {EACH(ROWS)};
static const some_values values_of[] = {EACH(VALUES)};

/* ---- what cpu.py calls */

/* The number of a format, which the other functions take; -1 for one that is not known. */
int format_number(const char *name)
{
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++)
        if (!strcmp(names[i], name))
            return i;
    return -1;
}

/* Whether the compiler knew OpenMP. */
int has_threads(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static inline int enough(int64_t numbers, int threads)
{
    return numbers < SMALL ? 1 : threads;
}

void values(int number, const struct weight *w, int rounding, void *to, int dtype, int threads)
{
    threads = enough(w->rows * w->columns, threads);
    int64_t pieces = threads > 1 ? threads * PIECES : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++)
        values_of[number](w, w->rows * piece / pieces, w->rows * (piece + 1) / pieces, rounding, to, dtype);
}

/* A call whose last argument is a dtype, compiled for each of them. */
#define BY_DTYPE(dtype, function, ...)              \
    ((dtype) == BF16  ? function(__VA_ARGS__, BF16) \
     : (dtype) == F16 ? function(__VA_ARGS__, F16)  \
                      : function(__VA_ARGS__, F32))

/* Of `size` numbers of two arrays, a multiple of 8, from a place on. */
static inline __attribute__((always_inline)) float dot(
    const void *x, int64_t x_place, int x_bf16, const void *y, int64_t y_place, int y_bf16, int64_t size)
{
    f32x8 sums[4] = {{0}};
    int64_t i = 0;
    for (; i + STEP <= size; i += STEP)
        for (int k = 0; k < 4; k++)
            sums[k] = multiply_add(
                eight(x, x_place + i + 8 * k, x_bf16), eight(y, y_place + i + 8 * k, y_bf16), sums[k]);
    for (; i < size; i += 8)
        sums[0] = multiply_add(eight(x, x_place + i, x_bf16), eight(y, y_place + i, y_bf16), sums[0]);
    return sum_of(sums);
}

/* y (out) += scale · (x Aᵀ) Bt, for x (in). */
static inline __attribute__((always_inline)) void add_update(
    const struct update *u, const float *x, float *y, float scale, int dtype)
{
    float z[MOST_RANK];
    for (int64_t k = 0; k < u->rank; k++)
        z[k] = scale * dot(x, 0, 0, u->A, k * u->in, dtype, u->in);
    for (int64_t i = 0; i < u->out; i += 8) {
        f32x8 sum = load(y + i);
        for (int64_t k = 0; k < u->rank; k++)
            sum = multiply_add((f32x8){0} + z[k], eight(u->Bt, k * u->out + i, dtype), sum);
        memcpy(y + i, &sum, sizeof sum);
    }
}

/* Layers of one input x (n, columns): the outputs (n, rows) of each lie in y behind those of the one before.
   The threads share the rows of all. */
void project(const struct part *parts, int count, const float *x, int n, float *y, int threads)
{
    int64_t total = 0;
    for (int i = 0; i < count; i++)
        total += parts[i].weight->rows;
    threads = enough(total * parts->weight->columns, threads);
    int64_t pieces = threads > 1 ? threads * PIECES : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t first = total * piece / pieces, last = total * (piece + 1) / pieces, start = 0;
        for (int i = 0; i < count; i++) {
            const struct part *p = parts + i;
            int64_t rows = p->weight->rows, from = first - start, to = last - start;
            from = from < 0 ? 0 : from, to = to > rows ? rows : to;
            if (from < to)
                rows_of[p->number](p->weight, from, to, x, n, y + n * start);
            start += rows;
        }
    }
    for (const struct part *p = parts; p < parts + count; p++) {
        int64_t rows = p->weight->rows;
        for (int64_t k = 0; p->bias && k < n * rows; k++)
            y[k] += p->bias[k % rows];
        for (int row = 0; p->updates && row < n; row++) {
            const struct update *u = p->updates[row];
            if (u)
                BY_DTYPE(u->dtype, add_update, u, x + row * u->in, y + row * rows, p->scales[row]);
        }
        y += n * rows;
    }
}

/* ---- what lies between the products of a token */

/* y = x / sqrt(mean(x²) + eps) · weight, for x (n, size). */
static inline __attribute__((always_inline)) void normalise(
    const struct norm *norm, const void *x, void *y, int64_t n, int64_t size, int dtype)
{
    for (int64_t row = 0; row < n; row++) {
        float squares = dot(x, row * size, dtype, x, row * size, dtype, size);
        float inverse = 1 / sqrtf(squares / (float)size + norm->eps);
        for (int64_t i = 0; i < size; i += 8) {
            f32x8 weight = eight(norm->weight, i, norm->dtype) + norm->more;
            put(y, row * size + i, eight(x, row * size + i, dtype) * inverse * weight, dtype);
        }
    }
}

void rms_norm(const struct norm *norm, const void *x, void *y, int64_t n, int64_t size, int dtype)
{
    BY_DTYPE(dtype, normalise, norm, x, y, n, size);
}

/* e^x for x of at most 0, 2^n · e^f with a small f, the latter by a polynomial. */
static inline f32x8 exponential(f32x8 x)
{
    const f32x8 zero = {0};
    i32x8 is_low = x < zero - 87; /* not of a NaN, which stays one */
    x = (f32x8)(((i32x8)(zero - 87) & is_low) | ((i32x8)x & ~is_low));
    f32x8 scaled = x * 1.44269504f;
    i32x8 n = __builtin_convertvector(scaled - 0.5f, i32x8); /* towards 0, and scaled is not positive */
    f32x8 whole = __builtin_convertvector(n, f32x8);
    f32x8 f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2 in two parts */
    f32x8 p = zero + 1.0f / 5040;
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++)
        p = multiply_add(p, f, zero + coefficients[i]);
    return p * (f32x8)((n + 127) << 23);
}

/* 1 / (1 + e^-x) */
static inline f32x8 sigmoid(f32x8 x)
{
    const f32x8 zero = {0};
    f32x8 magnitude = (f32x8)((u32x8)x & 0x7fffffff);
    f32x8 e = exponential(-magnitude), share = 1 / (1 + e);
    i32x8 is_negative = x < zero;
    return (f32x8)(((i32x8)(share * e) & is_negative) | ((i32x8)share & ~is_negative));
}

static inline f32x8 hyperbolic_tangent(f32x8 x)
{
    return 2 * sigmoid(2 * x) - 1;
}

static inline float largest_of(f32x8 v)
{
    float most = v[0];
    for (int i = 1; i < 8; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

/* Attention of one token: what the heads of one group of keys see. */
static inline __attribute__((always_inline)) void one_group(const struct attention *a, int64_t g, int dtype)
{
    int64_t heads = a->heads / a->groups, D = a->key_size, E = a->value_size;
    float q[MOST_QUERIES], sums[MOST_QUERIES], scores[TOKENS], most[MOST_HEADS], total[MOST_HEADS];
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t i = 0; i < D; i += 8) {
            f32x8 v = eight(a->q, (g * heads + h) * a->q_stride + i, a->query_dtype) * a->scale;
            memcpy(q + h * D + i, &v, sizeof v);
        }
        most[h] = a->sinks ? a->sinks[g * heads + h] : -INFINITY;
        total[h] = a->sinks ? 1 : 0;
        memset(sums + h * E, 0, sizeof *sums * (size_t)E);
    }
    for (int64_t start = 0; start < a->tokens; start += TOKENS) {
        int count = (int)(a->tokens - start < TOKENS ? a->tokens - start : TOKENS);
        for (int64_t h = 0; h < heads; h++) {
            for (int t = 0; t < count; t++) {
                int64_t place = g * a->key_group + (start + t) * a->key_stride;
                scores[t] = dot(q, h * D, 0, a->k, place, dtype, D);
            }
            for (int t = 0; a->softcap && t < TOKENS; t += 8) {
                f32x8 v = a->softcap * hyperbolic_tangent(load(scores + t) / a->softcap);
                memcpy(scores + t, &v, sizeof v);
            }
            for (int t = count; t < TOKENS; t++)
                scores[t] = -INFINITY;
            float before = most[h];
            for (int t = 0; t < TOKENS; t += 8) {
                float here = largest_of(load(scores + t));
                most[h] = here > most[h] ? here : most[h];
            }
            f32x8 shares = {0};
            for (int t = 0; t < TOKENS; t += 8) {
                f32x8 share = exponential(load(scores + t) - most[h]);
                memcpy(scores + t, &share, sizeof share);
            }
            for (int t = count; t < TOKENS; t++)
                scores[t] = 0;
            for (int t = 0; t < TOKENS; t += 8)
                shares += load(scores + t);
            f32x8 parts[4] = {shares};
            /* Sums so far are shares of another largest score. */
            f32x8 shrink = exponential((f32x8){0} + (before == most[h] ? 0 : before - most[h]));
            total[h] = total[h] * shrink[0] + sum_of(parts);
            for (int64_t i = 0; i < E; i += 8) {
                f32x8 even = {0}, odd = {0};
                int64_t place = g * a->value_group + start * a->value_stride + i, step = a->value_stride;
                int t = 0;
                for (; t + 1 < count; t += 2, place += 2 * step) {
                    even = multiply_add((f32x8){0} + scores[t], eight(a->v, place, dtype), even);
                    odd = multiply_add((f32x8){0} + scores[t + 1], eight(a->v, place + step, dtype), odd);
                }
                if (t < count)
                    even = multiply_add((f32x8){0} + scores[t], eight(a->v, place, dtype), even);
                f32x8 sum = multiply_add(load(sums + h * E + i), shrink, even + odd);
                memcpy(sums + h * E + i, &sum, sizeof sum);
            }
        }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < E; i += 8)
            put(a->y, (g * heads + h) * E + i, load(sums + h * E + i) / total[h], a->query_dtype);
}

void attend(const struct attention *a, int threads)
{
    threads = enough(a->groups * a->tokens * a->key_size, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t g = 0; g < a->groups; g++)
        BY_DTYPE(a->dtype, one_group, a, g);
}

#define SILU 0
#define GELU_TANH 1

/* GELU with a tanh is x · sigmoid(2 √(2/π) (x + 0.044715 x³)). */
static inline f32x8 activated(f32x8 x, int activation)
{
    if (activation == GELU_TANH)
        return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    return x * sigmoid(x);
}

/* down(activated(gate(x)) · up(x)): parts are gate, up and down; `inner` has room for gate's and up's
   outputs. */
void gated_mlp(
    const struct part *parts, int activation, const float *x, int n, float *inner, float *y, int threads)
{
    int64_t size = n * parts[0].weight->rows;
    project(parts, 2, x, n, inner, threads);
    for (int64_t i = 0; i < size; i += 8) {
        f32x8 v = activated(load(inner + i), activation) * load(inner + size + i);
        memcpy(inner + i, &v, sizeof v);
    }
    project(parts + 2, 1, inner, n, y, threads);
}

#include "cpu_block.h"
