/* Blocks of a model, for one token of each of a few sequences, in one call: what lies between their products
   is little, and takes longer to call than to compute. */

/* Where a sequence keeps a block's keys and values (groups, room, head_size), and how the first numbers of a
   head turn for its new token, if any do, all in the dtype of the block; how many tokens it holds, and the
   first that the new one sees. */
struct sequence {
    void *keys, *values;
    const void *cos, *sin;
    int64_t rotated, room, length, first;
};

enum { INPUT, QUERIES, KEYS, ATTENDED, MLP_INPUT, MLP_OUTPUT, NORMS };
enum { Q, K, V, O, GATE, UP, DOWN, PARTS };

/* A block in a dtype, to which results are rounded where torch rounds them. Numbers turn in pairs:
   neighbours if `interleaved`, else one of the first half and one of the second. Queries and keys are
   normalised head by head, or all heads `together`. */
struct block {
    struct part parts[PARTS];
    struct norm norms[NORMS];
    int64_t hidden, heads, groups, head_size;
    float scale, softcap, multiplier;
    int interleaved, together, activation, dtype;
};

static void round_all(float *x, int64_t size, int dtype)
{
    for (int64_t i = 0; dtype != F32 && i < size; i += 8) {
        f32x8 v = rounded_to(load(x + i), dtype);
        memcpy(x + i, &v, sizeof v);
    }
}

static inline float rounded(float value, int dtype)
{
    return dtype == F32 ? value : rounded_to((f32x8){value}, dtype)[0];
}

static void rounded_norm(
    const struct norm *norm, const float *x, float *y, int64_t n, int64_t size, int dtype)
{
    if (norm->weight)
        normalise(norm, x, y, n, size, 0);
    else if (x != y)
        memcpy(y, x, sizeof *y * (size_t)(n * size));
    round_all(y, n * size, dtype);
}

static float number_at(const void *array, int64_t place, int dtype)
{
    if (dtype == F32)
        return ((const float *)array)[place];
    u16x8 bits = {((const uint16_t *)array)[place]};
    return dtype == BF16 ? from_bf16(bits)[0] : from_f16(bits)[0];
}

/* One head, in place. */
static void rotate(const struct block *b, const struct sequence *s, float *x)
{
    float turned[MOST_HEAD];
    int64_t half = s->rotated / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = x[b->interleaved ? 2 * i : i], second = x[b->interleaved ? 2 * i + 1 : i + half];
        for (int64_t k = i; k < s->rotated; k += half) {
            float own = k < half ? first : second, other = k < half ? -second : first;
            float along = rounded(own * number_at(s->cos, k, b->dtype), b->dtype);
            float across = rounded(other * number_at(s->sin, k, b->dtype), b->dtype);
            turned[k] = rounded(along + across, b->dtype);
        }
    }
    memcpy(x, turned, sizeof *x * (size_t)s->rotated);
}

/* Keys and values (groups, head_size) of the new token, to where the sequence keeps them. */
static void keep(const struct block *b, const struct sequence *s, const float *k, const float *v)
{
    int64_t D = b->head_size;
    for (int64_t g = 0; g < b->groups; g++)
        for (int64_t i = 0; i < D; i += 8) {
            put(s->keys, (g * s->room + s->length) * D + i, load(k + g * D + i), b->dtype);
            put(s->values, (g * s->room + s->length) * D + i, load(v + g * D + i), b->dtype);
        }
}

/* What a sequence's queries q (heads, head_size) see, into y. */
static void attend_in(const struct block *b, const struct sequence *s, const float *q, float *y, int threads)
{
    int64_t D = b->head_size, start = s->first * D * (b->dtype == F32 ? 4 : 2);
    struct attention a = {
        .q = q, .k = (const char *)s->keys + start, .v = (const char *)s->values + start, .y = y,
        .heads = b->heads, .groups = b->groups, .tokens = s->length + 1 - s->first,
        .key_size = D, .value_size = D, .q_stride = D,
        .key_group = s->room * D, .key_stride = D, .value_group = s->room * D, .value_stride = D,
        .scale = b->scale, .softcap = b->softcap, .dtype = b->dtype,
    };
    attend(&a, threads);
}

/* x += what attention or the MLP gave, normalised if the block does so. */
static void add(const struct block *b, const struct norm *norm, float *given, float *x, int64_t n)
{
    for (int64_t i = 0; b->multiplier != 1 && i < n * b->hidden; i++)
        given[i] = rounded(given[i] * b->multiplier, b->dtype);
    rounded_norm(norm, given, given, n, b->hidden, b->dtype);
    for (int64_t i = 0; i < n * b->hidden; i++)
        x[i] += given[i];
    round_all(x, n * b->hidden, b->dtype);
}

/* Numbers of the memory that `blocks` needs for n sequences. */
int64_t block_memory(const struct block *b, int n)
{
    int64_t inner = b->parts[GATE].weight->rows, heads = 2 * b->heads + 2 * b->groups;
    return n * (3 * b->hidden + heads * b->head_size + 2 * inner);
}

/* stream (n, hidden): a token of each sequence. */
static void block(
    const struct block *b, const struct sequence *sequences, int n, float *stream, float *memory, int threads)
{
    int64_t size = n * b->hidden, D = b->head_size;
    float *normed = memory, *given = normed + size, *q = given + size;
    float *k = q + n * b->heads * D, *v = k + n * b->groups * D, *attended = v + n * b->groups * D;
    float *inner = attended + n * b->heads * D;

    rounded_norm(&b->norms[INPUT], stream, normed, n, b->hidden, b->dtype);
    project(b->parts + Q, 3, normed, n, q, threads);
    round_all(q, n * (b->heads + 2 * b->groups) * D, b->dtype);
    int64_t queries_apart = b->together ? 1 : b->heads, keys_apart = b->together ? 1 : b->groups;
    rounded_norm(&b->norms[QUERIES], q, q, n * queries_apart, b->heads / queries_apart * D, b->dtype);
    rounded_norm(&b->norms[KEYS], k, k, n * keys_apart, b->groups / keys_apart * D, b->dtype);
    for (int row = 0; row < n; row++) {
        const struct sequence *s = sequences + row;
        int64_t queries = row * b->heads * D, keys = row * b->groups * D;
        for (int64_t h = 0; s->rotated && h < b->heads; h++)
            rotate(b, s, q + queries + h * D);
        for (int64_t g = 0; s->rotated && g < b->groups; g++)
            rotate(b, s, k + keys + g * D);
        keep(b, s, k + keys, v + keys);
        attend_in(b, s, q + queries, attended + queries, threads);
    }
    round_all(attended, n * b->heads * D, b->dtype);
    project(b->parts + O, 1, attended, n, given, threads);
    round_all(given, size, b->dtype);
    add(b, &b->norms[ATTENDED], given, stream, n);

    rounded_norm(&b->norms[MLP_INPUT], stream, normed, n, b->hidden, b->dtype);
    gated_mlp(b->parts + GATE, b->activation, normed, n, inner, given, threads);
    round_all(given, size, b->dtype);
    add(b, &b->norms[MLP_OUTPUT], given, stream, n);
}

/* x (n, hidden) -> y through blocks of one dtype, for each of which there are n sequences; memory as the
   largest of them needs. */
void blocks(
    const struct block *const *all, int count, const struct sequence *sequences, int n, const void *x,
    void *y, float *memory, int threads)
{
    int64_t size = n * all[0]->hidden;
    int dtype = all[0]->dtype;
    for (int64_t i = 0; i < size; i += 8)
        put(memory, i, eight(x, i, dtype), 0);
    for (int i = 0; i < count; i++)
        block(all[i], sequences + i * n, n, memory, memory + size, threads);
    for (int64_t i = 0; i < size; i += 8)
        put(y, i, load(memory + i), dtype);
}
