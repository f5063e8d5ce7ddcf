/* A few rows of activations times a matrix of 8-bit floats with a scale per block of rows and columns.
 *
 * Codes become float32 on their way through registers, so that memory has to deliver one byte for each of them. Elements of
 * a block are summed in sixteen lanes, the columns of a lane in their order; what a lane has of all blocks follows, and then
 * the sum of lanes. So the bits are the same in each instruction set. tests/reference_products.py has the definition.
 */
#include "fp8.h"
#include "threads.h"

#define AT_ONCE 16 /* rows of the matrix that a thread takes at a time */

/* What is constant in the loops: rows of activations, and rows of the matrix. */
struct shape {
    int rows, outputs;
};

#define MOST 4  /* of either */
#define LINE 64 /* columns, a cache line of codes */

struct product {
    const uint8_t *codes; /* [outputs, columns], with a stride */
    const float *scales;  /* [blocks down, blocks across] */
    const float *x;       /* [rows, columns] */
    void *y;              /* [rows, outputs] */
    int64_t outputs, columns, stride, block_rows, block_columns, rows, next;
    int format, dtype;
};

/* For each row of the matrix: sums of products, in units of the format, and the largest codes seen. */
struct sums {
    sixteen of[MOST][MOST];
    uint8_t seen[MOST][LINE];
};

INLINE void add_sixteen(
    const uint8_t *codes, int64_t stride, const float *x, int64_t x_stride, enum format format, struct shape s,
    struct sums *sums) {
    sixteen own[MOST];
#pragma GCC unroll 4
    for (int r = 0; r < s.rows; r++)
        memcpy(&own[r], x + r * x_stride, sizeof own[r]);
#pragma GCC unroll 4
    for (int o = 0; o < s.outputs; o++) {
        sixteen numbers = numbers_of(codes + o * stride, format);
#pragma GCC unroll 4
        for (int r = 0; r < s.rows; r++)
            sums->of[r][o] += numbers * own[r];
    }
}

/* Of a NaN, nothing else would be seen. */
INLINE void look_at(const uint8_t *codes, int64_t n, uint8_t *seen) {
    for (int64_t i = 0; i < n; i++) {
        uint8_t code = codes[i] & 0x7F;
        seen[i] = code > seen[i] ? code : seen[i];
    }
}

/* Some sixteens of columns. */
INLINE void add_columns(
    const struct product *p, const uint8_t *codes, const float *x, int columns, enum format format, struct shape s,
    struct sums *sums) {
#pragma GCC unroll 4
    for (int o = 0; o < s.outputs; o++) {
        const uint8_t *own = codes + o * p->stride;
        __builtin_prefetch(own + MOST * p->stride);
        if (format == E4M3FN)
            look_at(own, columns, sums->seen[o]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < columns; k += SIXTEEN)
        add_sixteen(codes + k, p->stride, x + k, p->columns, format, s, sums);
}

/* Fewer than sixteen; as if there were zeros behind them. */
INLINE void add_rest(
    const struct product *p, const uint8_t *codes, const float *x, int64_t n, enum format format, struct shape s,
    struct sums *sums) {
    uint8_t rest[MOST][SIXTEEN] = {{0}};
    float own[MOST][SIXTEEN] = {{0}};
    for (int o = 0; o < s.outputs; o++) {
        memcpy(rest[o], codes + o * p->stride, (size_t)n);
        if (format == E4M3FN)
            look_at(rest[o], SIXTEEN, sums->seen[o]);
    }
    for (int r = 0; r < s.rows; r++)
        memcpy(own[r], x + r * p->columns, (size_t)n * sizeof *x);
    add_sixteen(rest[0], SIXTEEN, own[0], SIXTEEN, format, s, sums);
}

INLINE float sum_of(sixteen lanes) {
    float each[SIXTEEN];
    memcpy(each, &lanes, sizeof each);
    for (int half = SIXTEEN / 2; half; half /= 2)
        for (int l = 0; l < half; l++)
            each[l] += each[l + half];
    return each[0];
}

INLINE bool has_nan(const uint8_t *seen) {
    uint8_t largest = 0;
    for (int i = 0; i < LINE; i++)
        largest = seen[i] > largest ? seen[i] : largest;
    return largest == E4M3_NAN;
}

INLINE void add_rows(const struct product *p, int64_t output, int64_t row, enum format format, struct shape s) {
    const uint8_t *codes = p->codes + output * p->stride;
    const float *x = p->x + row * p->columns;
    int64_t across = (p->columns + p->block_columns - 1) / p->block_columns;
    const float *scales[MOST];
    for (int o = 0; o < s.outputs; o++)
        scales[o] = p->scales + (output + o) / p->block_rows * across;
    struct sums sums;
    memset(sums.seen, 0, sizeof sums.seen);
    sixteen totals[MOST][MOST];
#pragma GCC unroll 4
    for (int r = 0; r < s.rows; r++)
#pragma GCC unroll 4
        for (int o = 0; o < s.outputs; o++)
            totals[r][o] = (sixteen){0};
    for (int64_t block = 0; block < across; block++) {
        int64_t k = block * p->block_columns, end = least(k + p->block_columns, p->columns), columns = end - k;
#pragma GCC unroll 4
        for (int r = 0; r < s.rows; r++)
#pragma GCC unroll 4
            for (int o = 0; o < s.outputs; o++)
                sums.of[r][o] = (sixteen){0};
        for (; k + LINE <= end; k += LINE)
            add_columns(p, codes + k, x + k, LINE, format, s, &sums);
        for (; k + SIXTEEN <= end; k += SIXTEEN)
            add_columns(p, codes + k, x + k, SIXTEEN, format, s, &sums);
        if (k < end)
            add_rest(p, codes + k, x + k, end - k, format, s, &sums);
#pragma GCC unroll 4
        for (int o = 0; o < s.outputs; o++) {
            sixteen scale = (sixteen){0} + scales[o][block];
            if (columns < SIXTEEN) /* lanes without a column: an infinite scale would make NaNs of their zeros */
                for (int l = (int)columns; l < SIXTEEN; l++)
                    scale[l] = 0;
#pragma GCC unroll 4
            for (int r = 0; r < s.rows; r++)
                totals[r][o] += (format == E4M3FN ? sums.of[r][o] * E4M3_UNIT : sums.of[r][o]) * scale;
        }
    }
    for (int o = 0; o < s.outputs; o++) {
        bool nan = format == E4M3FN && has_nan(sums.seen[o]);
        for (int r = 0; r < s.rows; r++) {
            float total = nan ? from_bits(INFINITE_BITS | 1u << 22) : sum_of(totals[r][o]);
            store(p->y, (row + r) * p->outputs + output + o, total, (enum dtype)p->dtype);
        }
    }
}

/* All activations, with MOST rows of the matrix or one: as many of both as there are registers for. */
INLINE void add_all(const struct product *p, int64_t output, int outputs, enum format format) {
    int64_t row = 0;
    for (; row + 4 <= p->rows; row += 4)
        for (int half = 0; half < outputs; half += 2)
            add_rows(p, output + half, row, format, (struct shape){4, outputs > 1 ? 2 : 1});
    for (; row + 2 <= p->rows; row += 2)
        add_rows(p, output, row, format, (struct shape){2, outputs});
    if (row < p->rows)
        add_rows(p, output, row, format, (struct shape){1, outputs});
}

INLINE void take_rows(struct product *p, enum format format) {
    for (;;) {
        int64_t output = __atomic_fetch_add(&p->next, AT_ONCE, __ATOMIC_RELAXED);
        int64_t end = least(output + AT_ONCE, p->outputs);
        if (output >= end)
            return;
        for (; output + MOST <= end; output += MOST)
            add_all(p, output, MOST, format);
        for (; output < end; output++)
            add_all(p, output, 1, format);
    }
}

static void multiply(void *data) {
    struct product *p = data;
    if (p->format == E4M3FN)
        take_rows(p, E4M3FN);
    else
        take_rows(p, E5M2);
}

KERNEL(void, multiply_fp8)(
    const uint8_t *codes, int format, int64_t outputs, int64_t columns, int64_t stride, const float *scales, int64_t block_rows,
    int64_t block_columns, const float *x, int64_t rows, void *y, int dtype, parallel threads, int count) {
    struct product p = {
        .codes = codes,
        .scales = scales,
        .x = x,
        .y = y,
        .outputs = outputs,
        .columns = columns,
        .stride = stride,
        .block_rows = block_rows,
        .block_columns = block_columns,
        .rows = rows,
        .format = format,
        .dtype = dtype,
    };
    run(threads, threads_for(rows * outputs * columns, count), multiply, &p, (outputs + AT_ONCE - 1) / AT_ONCE);
}
