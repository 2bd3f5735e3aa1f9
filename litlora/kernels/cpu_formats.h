/* Values of a stored matrix, 32 at a time in registers, from each of the formats that weights are in. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define X86
#include <immintrin.h>
#endif

#define STEP 32  /* values that are made at a time; rows are whole multiples */

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
    const uint8_t *scale_bytes, *zeros;
    const int32_t *groups;
    int64_t shift, outer_shift, rows_per_scale, scales_per_row;
    float offset;
    int rounding;
};

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

/* Bits of a half: rounded to the nearest, ties to even. */
static inline u16x8 f16_bits(f32x8 v)
{
#ifdef X86
    return (u16x8)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    u32x8 bits = (u32x8)v, sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    u32x8 result = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    /* Those below 2^-14 are whole numbers of 2^-24, of which 1/2 has room for the lowest bits. */
    u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000;
    u32x8 is_subnormal = (u32x8)(magnitude < 0x38800000), is_nan = (u32x8)(v != v);
    u32x8 is_infinite = (u32x8)(magnitude >= 0x477ff000);
    result = (subnormal & is_subnormal) | (result & ~is_subnormal);
    result = (0x7c00 & is_infinite) | (result & ~is_infinite);
    return __builtin_convertvector(result | (is_nan & 0x200) | sign, u16x8);
#endif
}

/* A dtype, as `DTYPES` in cpu.py numbers them. */
#define F32 0
#define BF16 1
#define F16 2

static inline f32x8 rounded_to(f32x8 v, int dtype)
{
    if (dtype == BF16)
        return (f32x8)(bf16_bits(v) << 16);
    return dtype == F16 ? from_f16(f16_bits(v)) : v;
}

/* Eight numbers of an array, from a place on. */
static inline __attribute__((always_inline)) f32x8 eight(const void *array, int64_t place, int dtype)
{
    if (dtype == F32)
        return load((const float *)array + place);
    u16x8 bits = load_u16((const uint8_t *)((const uint16_t *)array + place));
    return dtype == BF16 ? from_bf16(bits) : from_f16(bits);
}

/* Eight numbers to an array, rounded to its dtype. */
static inline __attribute__((always_inline)) void put(void *array, int64_t place, f32x8 v, int dtype)
{
    if (dtype == F32) {
        memcpy((float *)array + place, &v, sizeof v);
        return;
    }
    u16x8 bits = dtype == BF16 ? __builtin_convertvector(bf16_bits(v), u16x8) : f16_bits(v);
    memcpy((uint16_t *)array + place, &bits, sizeof bits);
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
