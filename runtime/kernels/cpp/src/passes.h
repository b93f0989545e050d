// Choices in passes of bounded scratch, and each expert's tokens packed for a product with the weight's rows.
#pragma once
#include "arena.h"
#include "many.h"
#include "tasks.h"

namespace moeplan::VARIANT {

constexpr int64_t PASS_BYTES = 24 << 20;  // packed operands of a pass
constexpr int64_t PIECE = 512;            // an expert's tokens are split only into pieces of at least this many
constexpr int64_t LEAST_COST = 24;        // columns that are multiplied in the time in which a row comes from memory

// Some tokens of one expert: rows `row` to `row + n` of the plan. Their operands start at these offsets, in units.
struct Piece {
    int64_t expert, row, n;
    int64_t input, hidden;
    bool many;      // for `multiply_many`: operands are rows
    bool few;       // for `multiply_few`: operands are rows too; else they are panels
    int64_t block;  // rows of the weight in a task
    int64_t pack_end, product_end;  // running totals of tasks in the pass
};

struct Passes {
    Piece* pieces = nullptr;
    int64_t* first = nullptr;  // [count + 1] first piece of each pass
    int64_t count = 0, most_input = 0, most_hidden = 0;
    bool many = false;  // some piece has many rows

    static int64_t operand(bool rows, int64_t n, int64_t k) {
        return rows ? round_up(n * row_length(k) / PAIR, PANEL) : Panels::size(ceil_div(n, PANEL), k);
    }

    // Rows of `inputs` values, and of `hidden` values that the pass makes (0: none); products with `rows` rows of an
    // expert's weight, divided over threads by their cost, into blocks of at most `most_block`; for `many` rows
    // `many_block` (0: none are many).
    bool build(const Plan& plan, int64_t experts, int64_t inputs, int64_t hidden, int64_t rows, int64_t most_block,
               int64_t many_block, int64_t threads) {
        int64_t limit = experts + ceil_div(plan.rows, PIECE);
        pieces = take<Piece>(limit);
        first = take<int64_t>(limit + 1);
        if (!pieces || !first) return false;
        int64_t cost = 0;
        for (int64_t e = 0; e < experts; e++) {
            int64_t n = plan.start[e + 1] - plan.start[e];
            if (n) cost += most(n, LEAST_COST);
        }
        int64_t each = ceil_div(cost * rows, 12 * threads);
        int64_t row_bytes = (padded(inputs) + padded(hidden)) * static_cast<int64_t>(sizeof(Op));
        int64_t piece_rows = most(PIECE, PASS_BYTES / most(row_bytes, 1) / PANEL * PANEL);
        int64_t made = 0, pack_end = 0, product_end = 0, input_end = 0, hidden_end = 0;
        first[0] = 0;
        for (int64_t e = 0; e < experts; e++) {
            for (int64_t row = plan.start[e]; row < plan.start[e + 1]; row += piece_rows) {
                Piece& piece = pieces[made];
                int64_t n = least(piece_rows, plan.start[e + 1] - row);
                bool many = many_block && n >= MANY, few = n <= FEW;
                int64_t input_size = operand(many || few, n, inputs), hidden_size = operand(many || few, n, hidden);
                if (made > first[count] && (input_end + hidden_end + input_size + hidden_size) * 4 > PASS_BYTES) {
                    first[++count] = made;
                    pack_end = product_end = input_end = hidden_end = 0;
                }
                piece.expert = e;
                piece.row = row;
                piece.n = n;
                piece.many = many;
                piece.few = few;
                piece.input = input_end;
                piece.hidden = hidden_end;
                piece.block = least(most_block, most(PANEL, round_up(each / most(n, LEAST_COST), PANEL)));
                this->many |= many;
                if (many) piece.block = round_up(ceil_div(rows, ceil_div(rows, many_block)), PANEL);
                piece.pack_end = pack_end += ceil_div(n, PANEL);
                piece.product_end = product_end += ceil_div(rows, piece.block);
                most_input = most(most_input, input_end += input_size);
                most_hidden = most(most_hidden, hidden_end += hidden_size);
                made++;
            }
        }
        if (made) first[++count] = made;
        return true;
    }

    // The piece, between `begin` and `end`, that a task belongs to, by one of its running totals; `place` within it.
    template <int64_t Piece::*End>
    const Piece& find(int64_t begin, int64_t end, int64_t task, int64_t& place) const {
        int64_t low = begin, high = end - 1;
        while (low < high) {
            int64_t middle = (low + high) / 2;
            if (task < pieces[middle].*End) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        place = task - (low > begin ? pieces[low - 1].*End : 0);
        return pieces[low];
    }

    // Task of packing: one panel of a piece, or as many rows.
    void pack(int64_t begin, int64_t end, int64_t task, const Rows<Real>& x, int64_t k, float* inputs) const {
        int64_t panel;
        const Piece& piece = find<&Piece::pack_end>(begin, end, task, panel);
        float* units = inputs + piece.input;
        int64_t n = least(PANEL, piece.n - panel * PANEL);
        if (piece.few || piece.many) {
            Op* rows = reinterpret_cast<Op*>(units) + panel * PANEL * row_length(k);
            stage_rows(x, piece.row + panel * PANEL, n, k, rows, row_length(k));
        } else {
            pack_rows(x, piece.row + panel * PANEL, n, {units, ceil_div(piece.n, PANEL), k}, panel);
        }
    }
};

// sums [m, n] = w [m, k] times the operand of a piece's tokens t to t + n.
inline void weight_times_piece(const Real* w, int64_t m, const Piece& piece, float* units, int64_t t, int64_t n,
                               int64_t k, Scratch& scratch, float* sums) {
    if (piece.few) {
        scratch.multiply_adds += m * n * k;
        multiply_few(w, k, m, reinterpret_cast<const Op*>(units), row_length(k), n, k, sums, LINE);
    } else {
        Panels panels{units, ceil_div(piece.n, PANEL), k};
        weight_times_panels(w, m, panels, t / PANEL, round_up(n, PANEL), scratch, sums);
    }
}

}  // namespace moeplan::VARIANT
