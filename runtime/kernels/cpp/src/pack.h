// Operands of the products, in the form that `multiply` reads.
//
// A product's left operand is rows [m][k] of Op, in place where it can be; its right one is packed into panels
// [k units][16] of 32-bit units: a float, or with pairs two bf16 that follow each other along k.
#pragma once
#include "simd.h"

namespace moeplan::VARIANT {

#if MOEPLAN_PAIRS
using Op = bf16;
constexpr int64_t PAIR = 2;
inline vf step(vf sum, vf a, vf b) { return dot_pairs(sum, a, b); }
typedef uint32_t __attribute__((aligned(2), may_alias)) Unit;
inline vf broadcast(const Op* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(*reinterpret_cast<const Unit*>(p))); }
#else
using Op = float;
constexpr int64_t PAIR = 1;
inline vf step(vf sum, vf a, vf b) { return fma(a, b, sum); }
inline vf broadcast(const Op* p) { return splat(*p); }
#endif
// k of an operand is padded with zeros to a multiple of this.
#if MOEPLAN_AMX
constexpr int64_t K_STEP = 32;
// Rows of a left operand that may be read, and of its result that may be written, come in multiples of this.
constexpr int64_t ROW_STEP = 16;
#else
constexpr int64_t K_STEP = PAIR;
constexpr int64_t ROW_STEP = 1;
#endif
constexpr int64_t BLOCK = LANES * PAIR;  // values of a vector of units
constexpr int PANEL_VECTORS = PANEL / LANES;

inline int64_t padded(int64_t k) { return round_up(k, K_STEP); }
// Values from one staged row to the next: whole vectors, and a line more where a power of two would crowd few sets of
// the caches.
inline int64_t row_length(int64_t k) {
    int64_t whole = round_up(k, BLOCK);
    return whole % (8 * BLOCK) == 0 ? whole + BLOCK : whole;
}

// The panels that are multiplied at once fit the first-level cache.
constexpr int64_t CHUNK_UNITS = MOEPLAN_AMX ? 128 : 192;
constexpr int64_t CHUNK = CHUNK_UNITS * PAIR;

// A number for a template, as an argument.
template <int N>
struct Count {
    static constexpr int value = N;
};

// `count` panels of k values. They lie chunk by chunk, so that what is multiplied together is together: first all
// panels' first CHUNK_UNITS, one panel after the other, then all panels' next ones, and so on.
struct Panels {
    float* base;
    int64_t count, k;

    int64_t units() const { return padded(k) / PAIR; }
    int64_t depth(int64_t chunk) const { return least(CHUNK_UNITS, units() - chunk * CHUNK_UNITS); }
    float* at(int64_t panel, int64_t unit) const {
        int64_t chunk = unit / CHUNK_UNITS;
        return base + (chunk * CHUNK_UNITS * count + panel * depth(chunk) + unit % CHUNK_UNITS) * PANEL;
    }
    static int64_t size(int64_t count, int64_t k) { return count * (padded(k) / PAIR) * PANEL; }
};

// Rows of a matrix, taken through an index where there is one.
template <class X>
struct Rows {
    const X* base;
    int64_t stride;
    const int32_t* index;
    const X* operator[](int64_t row) const { return base + (index ? index[row] : row) * stride; }
};

// A vector of units from `values` values; the rest is zero.
#if MOEPLAN_PAIRS
inline vf load_units(const Real* p, int64_t values) { return load_pairs(p, values); }
// Units from n neighbouring values of a row and, with pairs, of the row after it (null: zeros).
inline vf load_across(const Real* a, const Real* b, int64_t n) {
    const __m256i none = _mm256_setzero_si256();
    if (n >= LANES) return interleave(load16(a), b ? load16(b) : none);
    return interleave(load16(a, n), b ? load16(b, n) : none);
}
#else
template <class X>
inline vf load_units(const X* p, int64_t values) {
    return values >= LANES ? load(p) : load(p, values);
}
template <class X>
inline vf load_across(const X* a, const X*, int64_t n) {
    return n >= LANES ? load(a) : load(a, n);
}
#endif

// One panel, whose columns are `n` (at most 16) rows: a transposition.
inline void pack_rows(const Rows<Real>& rows, int64_t first_row, int64_t n, const Panels& to, int64_t panel) {
    const Real* row[PANEL];
    for (int64_t r = 0; r < n; r++) row[r] = rows[first_row + r];
    for (int64_t u = 0; u < to.units(); u += LANES) {
        int64_t left = to.k - u * PAIR, count = least(LANES, to.units() - u);
        float* units = to.at(panel, u);
        for (int64_t c = 0; c < PANEL; c += LANES) {
            vf t[LANES];
#pragma GCC unroll 16
            for (int64_t r = 0; r < LANES; r++) {
                t[r] = c + r < n && left > 0 ? load_units(row[c + r] + u * PAIR, left) : zero();
            }
            transpose(t);
            if (count == LANES) {
#pragma GCC unroll 16
                for (int64_t j = 0; j < LANES; j++) store(units + j * PANEL + c, t[j]);
            } else {
                for (int64_t j = 0; j < count; j++) store(units + j * PANEL + c, t[j]);
            }
        }
    }
}

constexpr int64_t ROWS_AHEAD = 16;  // rows are asked for this many before they are read
constexpr int64_t LINE_VALUES = 64 / sizeof(Real);
constexpr int64_t START = 4 * LINE_VALUES;  // of a row: after so many the processor brings the others by itself

// Part of a matrix that will be wanted soon, brought closer a few lines at a time while something else is computed.
class Ahead {
public:
    Ahead(const Real* row, int64_t stride, int64_t rows, int64_t columns)
        : row(row), stride(stride), rows(columns > 0 ? rows : 0), columns(columns) {}

    template <int COUNT>
    void lines() {
        if (rows <= 0) return;
        if (column + COUNT * LINE_VALUES <= columns) {
#pragma GCC unroll 32
            for (int i = 0; i < COUNT; i++) fetch(column + i * LINE_VALUES);
            advance(COUNT);
        } else {  // across the ends of rows
            for (int i = 0; i < COUNT && rows > 0; i++) {
                fetch(column);
                advance(1);
            }
        }
    }

private:
    const Real* row;
    int64_t stride, rows, columns;
    int64_t column = 0;

    void advance(int64_t count) {
        column += count * LINE_VALUES;
        if (column < columns) return;
        column = 0;
        row += stride;
        rows--;
    }
    void fetch(int64_t at) const { _mm_prefetch(reinterpret_cast<const char*>(row + at), _MM_HINT_T1); }
};

// What a product brings closer: nothing; some of a part with every panel; or as much as it reads of its left operand.
struct NothingNext {
    static constexpr bool EVERY = false;  // with every panel, or only with the first ones
    template <int ROWS>
    void fetch() const {}
};
template <int LINES>
struct PartNext {
    static constexpr bool EVERY = true;
    Ahead* part;
    template <int ROWS>
    void fetch() const {
        part->lines<LINES>();
    }
};
struct AsMuchNext {
    static constexpr bool EVERY = false;
    Ahead* part;
    template <int ROWS>
    void fetch() const {
        part->lines<static_cast<int>((ROWS * sizeof(Real) + sizeof(Op) - 1) / sizeof(Op))>();
    }
};

// Panels from `panel` on, whose k runs over rows and whose columns are their columns `column` to `column + n`.
template <class X>
inline void pack_columns(const Rows<X>& rows, int64_t first_row, int64_t column, int64_t n, const Panels& to,
                         int64_t panel) {
    for (int64_t u = 0; u < to.units(); u++) {
        int64_t r = u * PAIR;
        const X* a = r < to.k ? rows[first_row + r] + column : nullptr;
        const X* b = PAIR == 2 && r + 1 < to.k ? rows[first_row + r + 1] + column : nullptr;
        float* units = to.at(panel, u);
        int64_t stride = to.depth(u / CHUNK_UNITS) * PANEL;
        // Of rows far apart the processor does not foresee the starts.
        for (int64_t j = r + ROWS_AHEAD; j < least(r + ROWS_AHEAD + PAIR, to.k); j++) {
            const X* next = rows[first_row + j] + column;
            for (int64_t c = 0; c < least(n, START); c += LINE_VALUES) _mm_prefetch(next + c, _MM_HINT_T0);
        }
        int64_t c = 0;
        // What most columns are, in as few instructions as can be: the farther ahead the processor reads.
#if MOEPLAN_PAIRS
        for (; b && c + 2 * PANEL <= n; c += 2 * PANEL) {
            vf low, high;
            interleave(a + c, b + c, low, high);
            store(units + c / PANEL * stride, low);
            store(units + (c / PANEL + 1) * stride, high);
        }
#else
        for (; a && c + PANEL <= n; c += PANEL) {
            for (int64_t i = 0; i < PANEL; i += LANES) store(units + c / PANEL * stride + i, load(a + c + i));
        }
#endif
        for (; c < round_up(n, PANEL); c += LANES) {
            vf x = a && c < n ? load_across(a + c, b ? b + c : nullptr, n - c) : zero();
            store(units + c / PANEL * stride + c % PANEL, x);
        }
    }
}

// `m` rows of k values as rows of an operand, `stride` apart; the rest of the last vector is zero.
inline void stage_rows(const Rows<Real>& rows, int64_t first_row, int64_t m, int64_t k, Op* out, int64_t stride) {
    for (int64_t r = 0; r < m; r++) {
        const Real* from = rows[first_row + r];
        Op* to = out + r * stride;
        int64_t i = 0;
        for (; i + LINE_VALUES <= k; i += LINE_VALUES) {
            // Where values are widened this made products slower.
            if (sizeof(Real) == sizeof(Op)) _mm_prefetch(reinterpret_cast<const char*>(from + i) + 1024, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int64_t j = i; j < i + LINE_VALUES; j += BLOCK) {
                store(reinterpret_cast<float*>(to + j), load_units(from + j, BLOCK));
            }
        }
        for (; i < padded(k); i += BLOCK) {
            vf x = i < k ? load_units(from + i, k - i) : zero();
            store(reinterpret_cast<float*>(to + i), x);
        }
    }
}

// Rows of an operand whose k runs over `k` rows of a matrix: row m is column `column` + m. Rows row_length(k) apart.
template <class X>
inline void stage_columns(const Rows<X>& rows, int64_t first_row, int64_t k, int64_t column, int64_t m, Op* out) {
    int64_t stride = row_length(k);
    for (int64_t i = 0; i < padded(k); i += BLOCK) {
        for (int64_t c = 0; c < m; c += LANES) {
            vf t[LANES];
            for (int64_t j = 0; j < LANES; j++) {
                int64_t r = i + j * PAIR;
                const X* b = PAIR == 2 && r + 1 < k ? rows[first_row + r + 1] + column + c : nullptr;
                t[j] = r < k ? load_across(rows[first_row + r] + column + c, b, m - c) : zero();
            }
            transpose(t);
            int64_t count = least(LANES, m - c);
            for (int64_t j = 0; j < count; j++) store(reinterpret_cast<float*>(out + (c + j) * stride + i), t[j]);
        }
    }
}

}  // namespace moeplan::VARIANT
