/* Formats of whole numbers of some bits, with a scale and a zero point for each group of columns of a row. */

static inline float zero_of(const struct weight *w, int64_t place, int is_signed)
{
    if (!w->zeros)
        return w->offset;
    return is_signed ? (float)(int8_t)w->zeros[place] : (float)w->zeros[place];
}

/* Of 32 numbers q: (q - zero) · scale. */
static inline void in_groups(const struct weight *w, int64_t row, int64_t column, int is_signed, f32x8 v[4])
{
    int64_t first = row * w->scales_per_row, place = first + (column >> w->shift);
    if (!w->groups) {
        float scale = w->scales[place], zero = zero_of(w, place, is_signed);
        for (int k = 0; k < 4; k++)
            v[k] = (v[k] - zero) * scale;
        return;
    }
    float scales[STEP], zeros[STEP];
    for (int i = 0; i < STEP; i++) {
        place = first + w->groups[column + i];
        scales[i] = w->scales[place], zeros[i] = zero_of(w, place, is_signed);
    }
    for (int k = 0; k < 4; k++)
        v[k] = (v[k] - load(zeros + 8 * k)) * load(scales + 8 * k);
}

/* The first number is in the lowest bits. */
static inline __attribute__((always_inline)) void of_bits(
    const struct weight *w, int64_t row, int64_t column, int bits, f32x8 v[4])
{
    const uint8_t *eight = w->entries + row * w->row_bytes + column * bits / 8;
    const u32x8 numbers = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int k = 0; k < 4; k++, eight += bits) {
        uint32_t word = 0;
        for (int i = 0; i < bits; i++)
            word |= (uint32_t)eight[i] << 8 * i;
        i32x8 q = (i32x8)((word >> numbers * (uint32_t)bits) & ((1u << bits) - 1));
        v[k] = __builtin_convertvector(q, f32x8);
    }
    in_groups(w, row, column, 0, v);
}

static inline void packed2(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    of_bits(w, row, column, 2, v);
}

static inline void packed3(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    of_bits(w, row, column, 3, v);
}

static inline void packed4(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    of_bits(w, row, column, 4, v);
}

static inline void packed8(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    for (int k = 0; k < 4; k++)
        v[k] = from_u8(w->entries + row * w->row_bytes + column + 8 * k);
    in_groups(w, row, column, 0, v);
}

static inline void signed8(const struct weight *w, int64_t row, int64_t column, f32x8 v[4])
{
    for (int k = 0; k < 4; k++)
        v[k] = from_i8(w->entries + row * w->row_bytes + column + 8 * k);
    in_groups(w, row, column, 1, v);
}
