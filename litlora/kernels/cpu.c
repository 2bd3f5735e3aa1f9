/* Products of a few rows with a frozen weight, which read it as it is stored, and its values.

   A token that is decoded reads every weight once: the fewer bytes, the sooner it is there, as long as the
   processor makes values of them as fast as the memory delivers. 32 values are made at a time, in registers.
   Sums are in fp32, and in the same order for one row as for several, so that a sequence of a batch gets
   what it gets alone.

   Nothing here checks sizes, allocates memory or fails: cpu.py sees to what is passed. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define X86
#include <immintrin.h>
#endif

#define STEP 32  /* values that are made at a time; rows are whole multiples */
#define TILE 512 /* values that wait in the first cache for several rows of x */
#define MOST_ROWS 8
#define MOST_RANK 128
#define MOST_HEADS 64     /* that share keys */
#define MOST_QUERIES 16384 /* their numbers together */
#define TOKENS 64
#define PIECES 8 /* for each thread, of which those that are done sooner take more */

typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int16_t i16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef int8_t i8x8 __attribute__((vector_size(8)));

/* The fields are those of `Weight` in cpu.py, which says what they are. */
struct weight {
    int64_t rows, columns, row_bytes, first;
    const int64_t *order;
    const uint8_t *entries;
    const float *scales, *table, *outer_table;
    const uint8_t *scale_bytes;
    int64_t shift, outer_shift, rows_per_scale, scales_per_row;
    float offset;
};

/* A (rank, in) and Bt (rank, out) of an adapter; `in` and `out` are multiples of 8. */
struct update {
    const void *A, *Bt;
    int64_t in, rank, out;
    int is_bf16;
};

/* A linear layer: its weight, and perhaps a bias (rows) and an update. */
struct part {
    const struct weight *weight;
    const struct update *update;
    const float *bias;
    float scale;
    int number;
};

/* A token's queries (heads, key_size), keys and values (groups, tokens, size) and result (heads, value_size),
   all in fp32 or bf16; `sinks` (heads) in fp32, or none. Strides of a group and of a token, in numbers. */
struct attention {
    const void *q, *k, *v;
    const float *sinks;
    void *y;
    int64_t heads, groups, tokens, key_size, value_size, q_stride;
    int64_t key_group, key_stride, value_group, value_stride;
    float scale;
    int is_bf16;
};

typedef void (*some_rows)(
    const struct weight *, int64_t first, int64_t last, const float *x, int n, float *y);
typedef void (*some_values)(
    const struct weight *, int64_t first, int64_t last, int rounded, void *to, int is_bf16);

/* ---- numbers */

static inline f32x8 load(const float *from)
{
    f32x8 v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline float bits_to_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 sum)
{
#ifdef X86
    return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

static inline f32x8 from_f16(u16x8 bits)
{
#ifdef X86
    return (f32x8)_mm256_cvtph_ps((__m128i)bits);
#else
    u32x8 wide = __builtin_convertvector(bits, u32x8);
    f32x8 magnitude = (f32x8)((wide & 0x7fff) << 13) * 0x1p112f;
    u32x8 special = (u32x8)((wide & 0x7c00) == 0x7c00) & 0x7f800000; /* infinity and NaN */
    return (f32x8)((u32x8)magnitude | special | (wide & 0x8000) << 16);
#endif
}

static inline f32x8 from_bf16(u16x8 bits)
{
#ifdef X86
    return (f32x8)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (f32x8)(__builtin_convertvector(bits, u32x8) << 16);
#endif
}

static inline float half(const uint8_t *from)
{
    u16x8 bits = {0};
    memcpy(&bits, from, 2);
    return from_f16(bits)[0];
}

static inline u16x8 load_u16(const uint8_t *from)
{
    u16x8 v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline u8x8 load_u8(const uint8_t *from)
{
    u8x8 v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline f32x8 from_u8(const uint8_t *from)
{
#ifdef X86
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return __builtin_convertvector(load_u8(from), f32x8);
#endif
}

static inline f32x8 from_i8(const uint8_t *from)
{
#ifdef X86
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    return __builtin_convertvector((i8x8)load_u8(from), f32x8);
#endif
}

/* Rounded to the nearest, ties to even. */
static inline u32x8 bf16_bits(f32x8 v)
{
    u32x8 bits = (u32x8)v, is_nan = (u32x8)(v != v); /* whose bits would run over */
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16 & ~is_nan) | (is_nan & 0x7fc0);
}

/* ---- formats: each makes the 32 values of a row that begin at a column */

static inline void f32(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const float *entries = (const float *)(w->entries + row * w->row_bytes) + column;
    for (int k = 0; k < 4; k++)
        v[k] = load(entries + 8 * k);
}

static inline void bf16(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *entries = w->entries + row * w->row_bytes + column * 2;
    for (int k = 0; k < 4; k++)
        v[k] = from_bf16(load_u16(entries + 16 * k));
}

static inline void f16(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *entries = w->entries + row * w->row_bytes + column * 2;
    for (int k = 0; k < 4; k++)
        v[k] = from_f16(load_u16(entries + 16 * k));
}

static inline float scale_of(const struct weight *w, int64_t row, int64_t column)
{
    return w->scales[row / w->rows_per_scale * w->scales_per_row + (column >> w->shift)];
}

static inline void int8(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *entries = w->entries + row * w->row_bytes + column;
    float largest = w->scales[row];
    for (int k = 0; k < 4; k++)
        v[k] = from_i8(entries + 8 * k) * largest * (float)(1.0 / 127);
}

static inline void e4m3(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *entries = w->entries + row * w->row_bytes + column;
    float scale = scale_of(w, row, column) * 256;
    for (int k = 0; k < 4; k++) {
        /* In the places of a half's exponent and fraction the bits mean 2^-8 of their value. */
        i16x8 wide = __builtin_convertvector((i8x8)load_u8(entries + 8 * k), i16x8);
        v[k] = from_f16((u16x8)(wide << 7) & 0xbfff) * scale;
    }
}

static inline void e5m2(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *entries = w->entries + row * w->row_bytes + column;
    float scale = scale_of(w, row, column);
    for (int k = 0; k < 4; k++)
        v[k] = from_f16(__builtin_convertvector(load_u8(entries + 8 * k), u16x8) << 8) * scale;
}

/* The table's values of 32 entries of 4 bits, the first of a byte in its upper half or its lower. */
static inline void look_up(const uint8_t *entries, const float *table, int upper_first, f32x8 v[4])
{
#ifdef X86
    /* Byte by byte of an fp32 number: a shuffle looks up one byte for all 32 entries. */
    __m256i a = _mm256_loadu_si256((const __m256i *)table);
    __m256i b = _mm256_loadu_si256((const __m256i *)table + 1);
    const __m256i gather = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                            0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    a = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(a, gather), together);
    b = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(b, gather), together);
    __m256i low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
    __m256i byte0 = _mm256_permute2x128_si256(low, low, 0x00);
    __m256i byte1 = _mm256_permute2x128_si256(high, high, 0x00);
    __m256i byte2 = _mm256_permute2x128_si256(low, low, 0x11);
    __m256i byte3 = _mm256_permute2x128_si256(high, high, 0x11);

    const __m128i fifteen = _mm_set1_epi8(15);
    __m128i bytes = _mm_loadu_si128((const __m128i *)entries);
    __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen), lower = _mm_and_si128(bytes, fifteen);
    __m128i one = upper_first ? upper : lower, other = upper_first ? lower : upper;
    __m256i n = _mm256_set_m128i(_mm_unpackhi_epi8(one, other), _mm_unpacklo_epi8(one, other));

    byte0 = _mm256_shuffle_epi8(byte0, n), byte1 = _mm256_shuffle_epi8(byte1, n);
    byte2 = _mm256_shuffle_epi8(byte2, n), byte3 = _mm256_shuffle_epi8(byte3, n);
    __m256i low01 = _mm256_unpacklo_epi8(byte0, byte1), high01 = _mm256_unpackhi_epi8(byte0, byte1);
    __m256i low23 = _mm256_unpacklo_epi8(byte2, byte3), high23 = _mm256_unpackhi_epi8(byte2, byte3);
    /* Entries 0 to 3 and 16 to 19, 4 to 7 and 20 to 23, and so on. */
    __m256i q0 = _mm256_unpacklo_epi16(low01, low23), q1 = _mm256_unpackhi_epi16(low01, low23);
    __m256i q2 = _mm256_unpacklo_epi16(high01, high23), q3 = _mm256_unpackhi_epi16(high01, high23);
    v[0] = (f32x8)_mm256_permute2x128_si256(q0, q1, 0x20);
    v[1] = (f32x8)_mm256_permute2x128_si256(q2, q3, 0x20);
    v[2] = (f32x8)_mm256_permute2x128_si256(q0, q1, 0x31);
    v[3] = (f32x8)_mm256_permute2x128_si256(q2, q3, 0x31);
#else
    float values[STEP];
    for (int i = 0; i < STEP / 2; i++) {
        values[2 * i] = table[upper_first ? entries[i] >> 4 : entries[i] & 15];
        values[2 * i + 1] = table[upper_first ? entries[i] & 15 : entries[i] >> 4];
    }
    memcpy(v, values, sizeof values);
#endif
}

static inline void scale_all(f32x8 v[4], float scale)
{
    for (int k = 0; k < 4; k++)
        v[k] *= scale;
}

static inline void four_bits(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    int64_t place = row * w->columns + column;
    look_up(w->entries + place / 2, w->table, 1, v);
    scale_all(v, w->scales[place >> w->shift]);
}

static inline void four_bits_nested(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    int64_t place = row * w->columns + column, block = place >> w->shift;
    look_up(w->entries + place / 2, w->table, 1, v);
    float inner = w->outer_table[w->scale_bytes[block]] * w->scales[block >> w->outer_shift];
    scale_all(v, inner + w->offset);
}

static inline void mxfp4(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    int64_t place = row * w->columns + column;
    uint32_t exponent = w->scale_bytes[place / 32];
    look_up(w->entries + place / 2, w->table, 0, v);
    scale_all(v, bits_to_float(exponent ? exponent << 23 : 1 << 22)); /* 2^-127 is subnormal */
}

/* ---- ggml's blocks of 32 */

static inline const uint8_t *block_of(
    const struct weight *w, int64_t row, int64_t column, int values, int bytes)
{
    return w->entries + row * w->row_bytes + column / values * bytes;
}

static inline void q8_0(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 32, 34);
    float d = half(block);
    for (int k = 0; k < 4; k++)
        v[k] = from_i8(block + 2 + 8 * k) * d;
}

/* 16 bytes: the lower halves of all, then the upper halves. */
static inline void halves(const uint8_t *bytes, f32x8 v[4])
{
    uint8_t q[STEP];
    u8x16 both;
    memcpy(&both, bytes, sizeof both);
    u8x16 lower = both & 15, upper = both >> 4;
    memcpy(q, &lower, sizeof lower), memcpy(q + STEP / 2, &upper, sizeof upper);
    for (int k = 0; k < 4; k++)
        v[k] = from_u8(q + 8 * k);
}

/* To each entry its fifth bit, which is worth 16. */
static inline void add_fifth(const uint8_t *from, f32x8 v[4])
{
    uint32_t bits;
    memcpy(&bits, from, sizeof bits);
    for (int k = 0; k < 4; k++) {
        const u32x8 places = {0, 1, 2, 3, 4, 5, 6, 7};
        i32x8 fifth = (i32x8)((bits >> 8 * k >> places & 1) << 4);
        v[k] += __builtin_convertvector(fifth, f32x8);
    }
}

static inline void q4_0(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 32, 18);
    float d = half(block);
    halves(block + 2, v);
    for (int k = 0; k < 4; k++)
        v[k] = (v[k] - 8) * d;
}

static inline void q4_1(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 32, 20);
    float d = half(block), m = half(block + 2);
    halves(block + 4, v);
    for (int k = 0; k < 4; k++)
        v[k] = v[k] * d + m;
}

static inline void q5_0(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 32, 22);
    float d = half(block);
    halves(block + 6, v);
    add_fifth(block + 2, v);
    for (int k = 0; k < 4; k++)
        v[k] = (v[k] - 16) * d;
}

static inline void q5_1(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 32, 24);
    float d = half(block), m = half(block + 2);
    halves(block + 8, v);
    add_fifth(block + 4, v);
    for (int k = 0; k < 4; k++)
        v[k] = v[k] * d + m;
}

/* ---- ggml's blocks of 256, in parts of 32 */

/* Of one part its scale and its minimum, of 6 bits each: q · scale - minimum. */
static inline void part_scales(const uint8_t *block, int part, float *scale, float *minimum)
{
    const uint8_t *s = block + 4;
    int a = part < 4 ? s[part] & 63 : (s[part + 4] & 15) | s[part - 4] >> 6 << 4;
    int b = part < 4 ? s[part + 4] & 63 : s[part + 4] >> 4 | s[part] >> 6 << 4;
    *scale = half(block) * (float)a, *minimum = half(block + 2) * (float)b;
}

static inline void q4_k(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 256, 144);
    int part = (int)(column % 256 / 32);
    const uint8_t *bytes = block + 16 + part / 2 * 32;
    uint8_t q[STEP];
    float scale, minimum;
    part_scales(block, part, &scale, &minimum);
    for (int i = 0; i < STEP; i++)
        q[i] = bytes[i] >> part % 2 * 4 & 15;
    for (int k = 0; k < 4; k++)
        v[k] = from_u8(q + 8 * k) * scale - minimum;
}

static inline void q5_k(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 256, 176), *fifth = block + 16;
    int part = (int)(column % 256 / 32);
    const uint8_t *bytes = block + 48 + part / 2 * 32;
    uint8_t q[STEP];
    float scale, minimum;
    part_scales(block, part, &scale, &minimum);
    for (int i = 0; i < STEP; i++)
        q[i] = (bytes[i] >> part % 2 * 4 & 15) | (fifth[i] >> part & 1) << 4;
    for (int k = 0; k < 4; k++)
        v[k] = from_u8(q + 8 * k) * scale - minimum;
}

static inline void q6_k(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    const uint8_t *block = block_of(w, row, column, 256, 210);
    int part = (int)(column % 256 / 32), quarter = part % 4;
    const uint8_t *low = block + part / 4 * 64 + quarter % 2 * 32, *high = block + 128 + part / 4 * 32;
    const int8_t *scales = (const int8_t *)block + 192 + part * 2;
    uint8_t q[STEP];
    float d = half(block + 208);
    for (int i = 0; i < STEP; i++)
        q[i] = (low[i] >> quarter / 2 * 4 & 15) | (high[i] >> 2 * quarter & 3) << 4;
    for (int k = 0; k < 4; k++)
        v[k] = (from_u8(q + 8 * k) - 32) * (d * (float)scales[k / 2]);
}

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
            for (int i = 0; i < steps; i++)
                values_at(w, stored, start + i * STEP, tile + 4 * i);
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

/* Some rows of W into `to` (rows, columns), in fp32 or bf16; `rounded`: to bf16 first. */
static inline __attribute__((always_inline)) void write(
    format values_at, const struct weight *w, int64_t first, int64_t last, int rounded, void *to, int is_bf16)
{
    for (int64_t row = first; row < last; row++) {
        int64_t stored = stored_row(w, row);
        for (int64_t column = 0; column < w->columns; column += STEP) {
            int64_t place = row * w->columns + column;
            f32x8 v[4];
            values_at(w, stored, column, v);
            for (int k = 0; k < 4; k++) {
                u32x8 bits = is_bf16 || rounded ? bf16_bits(v[k]) : (u32x8)v[k];
                if (is_bf16) {
                    u16x8 narrow = __builtin_convertvector(bits, u16x8);
                    memcpy((uint16_t *)to + place + 8 * k, &narrow, sizeof narrow);
                } else {
                    bits = rounded ? bits << 16 : bits;
                    memcpy((float *)to + place + 8 * k, &bits, sizeof bits);
                }
            }
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
        const struct weight *w, int64_t first, int64_t last, int rounded, void *to, int is_bf16) \
    {                                                                                            \
        write(name, w, first, last, rounded, to, is_bf16);                                       \
    }

#define EACH(do_it)                                                       \
    do_it(f32) do_it(bf16) do_it(f16) do_it(int8) do_it(e4m3) do_it(e5m2) \
    do_it(four_bits) do_it(four_bits_nested) do_it(mxfp4)                 \
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

void values(int number, const struct weight *w, int rounded, void *to, int is_bf16, int threads)
{
    int64_t pieces = threads > 1 ? threads * PIECES : 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++)
        values_of[number](w, w->rows * piece / pieces, w->rows * (piece + 1) / pieces, rounded, to, is_bf16);
}

/* Eight numbers of an array in fp32 or bf16, from a place on. */
static inline __attribute__((always_inline)) f32x8 eight(const void *array, int64_t place, int is_bf16)
{
    if (is_bf16)
        return from_bf16(load_u16((const uint8_t *)((const uint16_t *)array + place)));
    return load((const float *)array + place);
}

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

static inline __attribute__((always_inline)) void put(void *array, int64_t place, f32x8 v, int is_bf16)
{
    if (is_bf16) {
        u16x8 narrow = __builtin_convertvector(bf16_bits(v), u16x8);
        memcpy((uint16_t *)array + place, &narrow, sizeof narrow);
    } else
        memcpy((float *)array + place, &v, sizeof v);
}

/* y (n, out) += scale · (x Aᵀ) Bt, for x (n, in). */
static inline __attribute__((always_inline)) void update_rows(
    const struct update *u, const float *x, float *y, int n, float scale, int is_bf16)
{
    for (int row = 0; row < n; row++) {
        float z[MOST_RANK];
        for (int64_t k = 0; k < u->rank; k++)
            z[k] = scale * dot(x, row * u->in, 0, u->A, k * u->in, is_bf16, u->in);
        for (int64_t i = 0; i < u->out; i += 8) {
            f32x8 sum = load(y + row * u->out + i);
            for (int64_t k = 0; k < u->rank; k++)
                sum = multiply_add((f32x8){0} + z[k], eight(u->Bt, k * u->out + i, is_bf16), sum);
            memcpy(y + row * u->out + i, &sum, sizeof sum);
        }
    }
}

/* Layers of one input x (n, columns): the outputs (n, rows) of each lie in y behind those of the one before.
   The threads share the rows of all. */
void project(const struct part *parts, int count, const float *x, int n, float *y, int threads)
{
    int64_t total = 0, pieces = threads > 1 ? threads * PIECES : 1;
    for (int i = 0; i < count; i++)
        total += parts[i].weight->rows;
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
        if (p->update && p->update->is_bf16)
            update_rows(p->update, x, y, n, p->scale, 1);
        else if (p->update)
            update_rows(p->update, x, y, n, p->scale, 0);
        y += n * rows;
    }
}

/* ---- what lies between the products of a token */

/* y = x / sqrt(mean(x²) + eps) · weight, for x (n, size), in fp32 or bf16; the weight has either, too. */
void rms_norm(const void *x, const void *weight, void *y, int64_t n, int64_t size, float eps, int is_bf16,
              int weight_is_bf16)
{
    for (int64_t row = 0; row < n; row++) {
        float squares = dot(x, row * size, is_bf16, x, row * size, is_bf16, size);
        float inverse = 1 / sqrtf(squares / (float)size + eps);
        for (int64_t i = 0; i < size; i += 8) {
            f32x8 v = eight(x, row * size + i, is_bf16) * inverse * eight(weight, i, weight_is_bf16);
            put(y, row * size + i, v, is_bf16);
        }
    }
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

static inline float largest_of(f32x8 v)
{
    float most = v[0];
    for (int i = 1; i < 8; i++)
        most = v[i] > most ? v[i] : most;
    return most;
}

/* Attention of one token: what the heads of one group of keys see. */
static inline __attribute__((always_inline)) void one_group(const struct attention *a, int64_t g, int is_bf16)
{
    int64_t heads = a->heads / a->groups, D = a->key_size, E = a->value_size;
    float q[MOST_QUERIES], sums[MOST_QUERIES], scores[TOKENS], most[MOST_HEADS], total[MOST_HEADS];
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t i = 0; i < D; i += 8) {
            f32x8 v = eight(a->q, (g * heads + h) * a->q_stride + i, is_bf16) * a->scale;
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
                scores[t] = dot(q, h * D, 0, a->k, place, is_bf16, D);
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
                    even = multiply_add((f32x8){0} + scores[t], eight(a->v, place, is_bf16), even);
                    odd = multiply_add((f32x8){0} + scores[t + 1], eight(a->v, place + step, is_bf16), odd);
                }
                if (t < count)
                    even = multiply_add((f32x8){0} + scores[t], eight(a->v, place, is_bf16), even);
                f32x8 sum = multiply_add(load(sums + h * E + i), shrink, even + odd);
                memcpy(sums + h * E + i, &sum, sizeof sum);
            }
        }
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < E; i += 8)
            put(a->y, (g * heads + h) * E + i, load(sums + h * E + i) / total[h], is_bf16);
}

void attend(const struct attention *a, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t g = 0; g < a->groups; g++)
        if (a->is_bf16)
            one_group(a, g, 1);
        else
            one_group(a, g, 0);
}

static inline f32x8 silu(f32x8 x)
{
    const f32x8 zero = {0};
    f32x8 magnitude = (f32x8)((u32x8)x & 0x7fffffff);
    f32x8 e = exponential(-magnitude), share = 1 / (1 + e);
    i32x8 is_negative = x < zero;
    return x * (f32x8)(((i32x8)(share * e) & is_negative) | ((i32x8)share & ~is_negative));
}

/* down(silu(gate(x)) · up(x)): parts are gate, up and down; `inner` has room for gate's and up's outputs. */
void gated_mlp(const struct part *parts, const float *x, int n, float *inner, float *y, int threads)
{
    int64_t size = n * parts[0].weight->rows;
    project(parts, 2, x, n, inner, threads);
    for (int64_t i = 0; i < size; i += 8) {
        f32x8 v = silu(load(inner + i)) * load(inner + size + i);
        memcpy(inner + i, &v, sizeof v);
    }
    project(parts + 2, 1, inner, n, y, threads);
}
