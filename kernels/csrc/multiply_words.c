/* A few rows of activations times a matrix of integer codes in words of 32 bits; and such a matrix in full precision.
 *
 * Activations become integers of 23 bits, with a power of two for each STEP of them, and those three signed bytes, their
 * digits. Products of digits and codes are summed as integers, which is exact in any order, and the few floating
 * operations that follow have one order: the bits are the same in each instruction set. tests/reference_products.py has
 * the definition.
 *
 * With one row, what takes time are the words' way from memory. They lie in blocks of outputs for that, each of which is
 * read from its beginning to its end, by one thread.
 */
#include "blocks.h"
#include "threads.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

/* A register, and how many of them are worth a pass over the words with one row and with two. */
#if defined(__AVX512BW__)
#define LANES 16
#define ALONE 4
#define TOGETHER 2
#elif defined(__AVX2__)
#define LANES 8
#define ALONE 2
#define TOGETHER 1
#else
#define LANES 4
#define ALONE 2
#define TOGETHER 1
#endif

#define STEP 128 /* inputs that have a power of two of their own, at most; products.py has it, too */
#define DIGITS 3
#define FRACTION 22 /* the largest activation of a step becomes an integer of at most so many bits, and a sign */
#define AHEAD 40 /* words of an output that memory is asked for ahead of time */
/* Rows done together: their digits fit into a second-level cache, the codes come from memory once for all of them;
 * products.py has it, too. */
#define ROWS 64
#define OWN_SCRATCH (1 << 15) /* bytes on the stack; products.py has it, too */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* products.py has it, too. */
struct matrix {
    /* Blocks of [inputs / (32 / bits), 64], the last one with as many outputs as are left. */
    const uint32_t *words;
    const void *scales;   /* blocks of [groups, 64] */
    const uint8_t *zeros; /* the same */
    int64_t inputs, outputs, group;
    int64_t steps; /* of a row */
    int bits, scales_dtype;
};

/* A step of a row of activations. */
struct step {
    float unit; /* what an integer of 1 stands for */
    int32_t sums[DIGITS];
};

/* Some rows of a product. */
struct product {
    const struct matrix *matrix;
    const void *x;      /* [rows, inputs] */
    int8_t *digits;     /* [rows, DIGITS, inputs], the lowest first */
    struct step *steps; /* [rows, steps] */
    void *y;            /* [rows, outputs] */
    int64_t rows, next;
    int dtype;
};

/* Steps begin anew with each group. */
#define EACH_STEP(matrix, group, first, count)                                                                                 \
    for (int64_t group = 0; group * (matrix)->group < (matrix)->inputs; group++)                                               \
        for (int64_t first = group * (matrix)->group, count;                                                                   \
             (count = least(STEP, least((group + 1) * (matrix)->group, (matrix)->inputs) - first)) > 0; first += count)

/* From activations to digits ---------------------------------------------------------------------------------------- */

INLINE void split(const void *x, int64_t first, int64_t count, enum dtype dtype, int64_t inputs, int8_t *digits, struct step *step) {
    float values[STEP];
    for (int64_t i = 0; i < count; i++)
        values[i] = load(x, first + i, dtype);
    uint32_t largest = largest_bits(values, count, FLOAT32);
    bool finite = largest < INFINITE_BITS;
    /* 2^exponent is above all. Where they are so small that a factor would be infinite, they count as less. */
    int32_t exponent = (int32_t)(largest >> 23) - 126;
    exponent = exponent < -100 ? -100 : exponent;
    float factor = from_bits((uint32_t)(FRACTION - exponent + 127) << 23);
    step->unit = finite ? from_bits((uint32_t)(exponent - FRACTION + 127) << 23) : from_bits(INFINITE_BITS | 1u << 22);
    int32_t integers[STEP], sums[DIGITS] = {0};
    for (int64_t i = 0; i < count; i++)
        integers[i] = finite ? (int32_t)(to_bits(values[i] * factor + ROUNDER) - to_bits(ROUNDER)) : 0;
    for (int d = 0; d < DIGITS; d++, digits += inputs)
        for (int64_t i = 0; i < count; i++) {
            int32_t digit = (int8_t)integers[i];
            integers[i] = (integers[i] - digit) >> 8;
            digits[i] = (int8_t)digit;
            sums[d] += digit;
        }
    memcpy(step->sums, sums, sizeof sums);
}

static void split_rows(void *data) {
    struct product *p = data;
    const struct matrix *m = p->matrix;
    for (;;) {
        int64_t row = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED);
        if (row >= p->rows)
            return;
        struct step *step = p->steps + row * m->steps;
        EACH_STEP(m, group, first, count) {
            int8_t *digits = p->digits + row * DIGITS * m->inputs + first;
            split(p->x, row * m->inputs + first, count, (enum dtype)p->dtype, m->inputs, digits, step++);
        }
    }
}

/* Products ---------------------------------------------------------------------------------------------------------- */

#if defined(__AVX512BW__)
#define REGISTER(name) _mm512_##name
#define LOAD_BYTES(from) _mm_loadu_si128((const __m128i *)(from)) /* one for each lane */
typedef __m512i wide;
typedef __m256i halves;
#elif defined(__AVX2__)
#define REGISTER(name) _mm256_##name
#define LOAD_BYTES(from) _mm_loadl_epi64((const __m128i *)(from))
typedef __m256i wide;
typedef __m128i halves;
#endif

/* sum + the products of four codes, a byte each, and four digits. */
INLINE ints dot(ints sum, words codes, int32_t digits, int bits) {
#if defined(__AVX512VNNI__)
    (void)bits;
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(digits));
#elif defined(__AVX2__)
    if (bits < 8) { /* or two products could be too much for 16 bits */
        wide pairs = REGISTER(maddubs_epi16)((wide)codes, REGISTER(set1_epi32)(digits));
        return sum + (ints)REGISTER(madd_epi16)(pairs, REGISTER(set1_epi16)(1));
    }
    int32_t even = (int8_t)digits & 0xFFFF, odd = (int8_t)(digits >> 8) & 0xFFFF;
    even |= (int32_t)((uint32_t)(digits >> 16) << 24) >> 8 & ~0xFFFF;
    odd |= digits >> 24 << 16;
    sum += (ints)REGISTER(madd_epi16)((wide)(codes & 0x00FF00FF), REGISTER(set1_epi32)(even));
    return sum + (ints)REGISTER(madd_epi16)((wide)(codes >> 8 & 0x00FF00FF), REGISTER(set1_epi32)(odd));
#else
    (void)bits;
    for (int i = 0; i < 32; i += 8)
        sum += (ints)(codes >> i & 255) * (int32_t)(int8_t)(digits >> i);
    return sum;
#endif
}

/* A group's parameters of some outputs, zero in lanes that aren't asked for. What compilers make of the loops takes
 * longer than the rest of a step does. */

INLINE floats load_scales(const void *from, int64_t i, int lanes, enum dtype dtype) {
    floats scales = {0};
    if (dtype == FLOAT32 && lanes == LANES) {
        memcpy(&scales, (const float *)from + i, sizeof scales);
        return scales;
    }
#if defined(__AVX512BW__) || defined(__AVX2__)
    if (lanes == LANES) {
        halves sixteen_bits;
        memcpy(&sixteen_bits, (const uint16_t *)from + i, sizeof sixteen_bits);
        if (dtype == FLOAT16)
            return REGISTER(cvtph_ps)(sixteen_bits);
        return (floats)((words)REGISTER(cvtepu16_epi32)(sixteen_bits) << 16);
    }
#endif
    for (int l = 0; l < lanes; l++)
        scales[l] = load(from, i + l, dtype);
    return scales;
}

INLINE floats load_zeros(const uint8_t *from, int lanes) {
#if defined(__AVX512BW__) || defined(__AVX2__)
    if (lanes == LANES)
        return __builtin_convertvector((ints)REGISTER(cvtepu8_epi32)(LOAD_BYTES(from)), floats);
#endif
    floats zeros = {0};
    for (int l = 0; l < lanes; l++)
        zeros[l] = (float)from[l];
    return zeros;
}

/* Where the parameters of a group are, in a block. */
INLINE int64_t of_group(const struct matrix *m, int64_t block, int64_t width, int64_t group) {
    return block * BLOCK * ((m->inputs + m->group - 1) / m->group) + group * width;
}

#define MOST 4 /* rows, and vectors */

/* What is constant in the loops. */
struct shape {
    int bits, rows, vectors;
};

/* Some outputs of a block and some rows: where they are. */
struct place {
    int64_t block, width, column, row;
    int lanes; /* of each vector; fewer than LANES only if there is one vector */
};

/* The products of a step, digit by digit. */
INLINE void add_products(
    const struct product *p, struct place here, int64_t first, int64_t count, ints sums[MOST][MOST][DIGITS], struct shape s) {
    const struct matrix *m = p->matrix;
    int per_word = 32 / s.bits, places = 8 / s.bits;
    const uint32_t *from = m->words + (here.block * BLOCK * m->inputs + first * here.width) / per_word + here.column;
    const int8_t *digits = p->digits + here.row * DIGITS * m->inputs + first;
    for (int64_t k = 0; k < count; k += per_word, from += here.width)
        for (int v = 0; v < s.vectors; v++) {
            words w = {0};
            memcpy(&w, from + v * LANES, here.lanes == LANES ? sizeof w : (size_t)(4 * here.lanes));
            __builtin_prefetch(from + AHEAD * here.width + v * LANES);
#pragma GCC unroll 4
            for (int place = 0; place < places; place++) {
                words codes = w >> (uint32_t)(place * s.bits) & ((1u << s.bits) - 1) * 0x01010101u;
                for (int r = 0; r < s.rows; r++)
                    for (int d = 0; d < DIGITS; d++) {
                        int32_t four;
                        memcpy(&four, digits + (r * DIGITS + d) * m->inputs + k + 4 * place, sizeof four);
                        sums[r][v][d] = dot(sums[r][v][d], codes, four, s.bits);
                    }
            }
        }
}

INLINE void add_outputs(const struct product *p, struct place here, struct shape s) {
    const struct matrix *m = p->matrix;
    int64_t output = here.block * BLOCK + here.column;
    const struct step *step = p->steps + here.row * m->steps;
    floats totals[MOST][MOST];
    for (int r = 0; r < s.rows; r++)
        for (int v = 0; v < s.vectors; v++)
            totals[r][v] = (floats){0};
    EACH_STEP(m, group, first, count) {
        int64_t parameters = of_group(m, here.block, here.width, group) + here.column;
        for (int v = 0; v < s.vectors; v++) {
            __builtin_prefetch(at(m->scales, parameters + v * LANES, (enum dtype)m->scales_dtype));
            __builtin_prefetch(m->zeros + parameters + v * LANES);
        }
        ints sums[MOST][MOST][DIGITS];
        for (int r = 0; r < s.rows; r++)
            for (int v = 0; v < s.vectors; v++)
                for (int d = 0; d < DIGITS; d++)
                    sums[r][v][d] = (ints){0};
        add_products(p, here, first, count, sums, s);
#pragma GCC unroll 4
        for (int v = 0; v < s.vectors; v++) {
            int64_t i = parameters + v * LANES;
            floats scales = load_scales(m->scales, i, here.lanes, (enum dtype)m->scales_dtype);
            floats zeros = load_zeros(m->zeros + i, here.lanes);
            for (int r = 0; r < s.rows; r++) {
                const struct step *own = step + r * m->steps;
                floats sum = {0};
                for (int d = DIGITS - 1; d >= 0; d--) /* each difference is exact */
                    sum = sum * 256.0f + (__builtin_convertvector(sums[r][v][d], floats) - zeros * (float)own->sums[d]);
                totals[r][v] += scales * (sum * own->unit);
            }
        }
        step++;
    }
    for (int r = 0; r < s.rows; r++)
        for (int v = 0; v < s.vectors; v++)
            for (int l = 0; l < here.lanes; l++)
                store(p->y, (here.row + r) * m->outputs + output + v * LANES + l, totals[r][v][l], (enum dtype)p->dtype);
}

INLINE void add_rows(const struct product *p, struct place here, struct shape s) {
    here.lanes = LANES;
    for (here.column = 0; here.column + s.vectors * LANES <= here.width; here.column += s.vectors * LANES)
        add_outputs(p, here, s);
    s.vectors = 1;
    for (; here.column < here.width; here.column += LANES) {
        here.lanes = (int)least(LANES, here.width - here.column);
        add_outputs(p, here, s);
    }
}

INLINE void take_blocks(struct product *p, int bits) {
    for (;;) {
        struct place here = {.block = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)};
        here.width = least(BLOCK, p->matrix->outputs - here.block * BLOCK);
        if (here.width <= 0)
            return;
        for (; here.row + 2 <= p->rows; here.row += 2)
            add_rows(p, here, (struct shape){bits, 2, TOGETHER});
        if (here.row < p->rows)
            add_rows(p, here, (struct shape){bits, 1, ALONE});
    }
}

static void multiply(void *data) {
    struct product *p = data;
    if (p->matrix->bits == 4)
        take_blocks(p, 4);
    else if (p->matrix->bits == 8)
        take_blocks(p, 8);
    else
        take_blocks(p, 2);
}

/* `scratch` has room for the steps and the digits of as many rows as are done together; NULL if that is no more than
 * OWN_SCRATCH. */
KERNEL(void, multiply_words)(
    const struct matrix *m, const void *x, int dtype, int64_t rows, void *scratch, void *y, parallel threads, int count) {
    struct step own[OWN_SCRATCH / sizeof(struct step)];
    int64_t together = least(rows, ROWS);
    struct step *steps = scratch ? scratch : own;
    for (int64_t row = 0; row < rows; row += together) {
        struct product p = {
            .matrix = m,
            .x = at(x, row * m->inputs, (enum dtype)dtype),
            .digits = (int8_t *)(steps + together * m->steps),
            .steps = steps,
            .y = (void *)at(y, row * m->outputs, (enum dtype)dtype),
            .rows = least(together, rows - row),
            .dtype = dtype,
        };
        int worthwhile = threads_for(p.rows * m->inputs * m->outputs, count);
        run(threads, worthwhile, split_rows, &p, p.rows);
        p.next = 0;
        run(threads, worthwhile, multiply, &p, (m->outputs + BLOCK - 1) / BLOCK);
    }
}

/* Full precision ---------------------------------------------------------------------------------------------------- */

struct part {
    const struct matrix *matrix;
    int64_t first, count, next; /* outputs; the first one begins a block */
    void *values;               /* [inputs, count] */
    int dtype;
};

INLINE void store_row(const float *values, int64_t n, void *to, int64_t i, enum dtype dtype) {
    if (dtype == FLOAT16)
        store_halves(values, n, (uint16_t *)to + i);
    else
        for (int64_t j = 0; j < n; j++)
            store(to, i + j, values[j], dtype);
}

INLINE void decode_block(const struct part *p, int64_t column, int64_t width, enum dtype dtype) {
    const struct matrix *m = p->matrix;
    int per_word = 32 / m->bits;
    uint32_t mask = (1u << m->bits) - 1;
    const uint32_t *from = m->words + (p->first + column) * m->inputs / per_word;
    float scales[BLOCK], values[BLOCK];
    int32_t zeros[BLOCK];
    for (int64_t k = 0; k < m->inputs; k += per_word, from += width) {
        if (k % m->group == 0)
            for (int64_t n = 0; n < width; n++) {
                int64_t i = of_group(m, (p->first + column) / BLOCK, width, k / m->group) + n;
                scales[n] = load(m->scales, i, (enum dtype)m->scales_dtype);
                zeros[n] = m->zeros[i];
            }
        for (int i = 0; i < per_word; i++) {
            for (int64_t n = 0; n < width; n++)
                values[n] = scales[n] * (float)((int32_t)(from[n] >> SHIFT_OF(i, m->bits) & mask) - zeros[n]);
            store_row(values, width, p->values, (k + i) * p->count + column, dtype);
        }
    }
}

static void decode(void *data) {
    struct part *p = data;
    for (;;) {
        int64_t column = __atomic_fetch_add(&p->next, BLOCK, __ATOMIC_RELAXED), width = least(BLOCK, p->count - column);
        if (width <= 0)
            return;
        if (p->dtype == BFLOAT16)
            decode_block(p, column, width, BFLOAT16);
        else if (p->dtype == FLOAT16)
            decode_block(p, column, width, FLOAT16);
        else
            decode_block(p, column, width, FLOAT32);
    }
}

KERNEL(void, decode_words)(
    const struct matrix *m, int64_t first, int64_t outputs, int dtype, void *values, parallel threads, int count) {
    struct part part = {m, first, outputs, 0, values, dtype};
    run(threads, count, decode, &part, (outputs + BLOCK - 1) / BLOCK);
}
