// Choices in passes of bounded scratch, and each expert's tokens packed for a product with the weight's rows.
#pragma once
#include "arena.h"
#include "many.h"
#include "tasks.h"
#include "turned.h"

namespace moeplan::VARIANT {

// Packed operands of a pass: half as much where they are float32 and the values are not.
constexpr int64_t PASS_BYTES = (24 << 20) * sizeof(Real) / sizeof(Op);
constexpr int64_t PIECE = 512;            // an expert's tokens are split only into pieces of at least this many
constexpr int64_t LEAST_COST = 24;        // columns that are multiplied in the time in which a row comes from memory

// So few rows after an expert's whole panels take less time as rows than as a panel of their own, while the weight's
// rows are near; where an expert has many rows those do not stay. Tiles are as fast for one row as for 16.
constexpr int64_t TAIL = MOEPLAN_AMX ? 0 : LANES == 8 ? 10 : 6, TAILED = 96;
static_assert(TAIL <= FEW && TAILED <= COLUMNS, "a tail is for multiply_few, and in the only block of columns");

// Divides a list, from few rows to many, into passes of bounded scratch, each with some from both ends. units(i): what
// item i takes of it; put(i): i is the next item of the pass, which goes from few rows to many as well.
template <class Units, class Put, class Close>
inline void divide(int64_t count, Units units, Put put, Close close) {
    for (int64_t low = 0, high = count; low < high;) {
        int64_t from = low, to = high, sum = 0;
        for (bool last = true; low < high; last = !last) {
            sum += units(last ? high - 1 : low);
            bool empty = high - low == to - from;
            if (!empty && sum * 4 > PASS_BYTES) break;
            if (last) {
                high--;
            } else {
                low++;
            }
        }
        for (int64_t i = from; i < low; i++) put(i);
        for (int64_t i = high; i < to; i++) put(i);
        close();
    }
}

// Some tokens of one expert: rows `row` to `row + n` of the plan. Their operands start at these offsets, in units.
struct Piece {
    int64_t expert, row, n;
    int64_t input, hidden;
    bool many;             // for `multiply_many`
    int64_t panels, tail;  // of which its operands are made: panels of 16 of its rows, then rows as they are
    int64_t block;         // rows of the weight in a task
    int64_t pack_end, product_end;  // running totals of tasks in the pass

    void split() {
        bool rows = many || n <= FEW;
        tail = rows ? n : n <= TAILED && n % PANEL <= TAIL ? n % PANEL : 0;
        panels = rows ? 0 : ceil_div(n - tail, PANEL);
    }
    // Units of an operand with rows of k values.
    int64_t operand(int64_t k) const { return tail_start(k) + round_up(tail * row_length(k) / PAIR, PANEL); }
    int64_t tail_start(int64_t k) const { return Panels::size(panels, k); }
};

struct Passes {
    Piece* pieces = nullptr;
    int64_t* first = nullptr;  // [count + 1] first piece of each pass
    int64_t count = 0, most_input = 0, most_hidden = 0;
    bool many = false;  // some piece has many rows

    // Rows of `inputs` values, and of `hidden` values that the pass makes (0: none); products with `rows` rows of an
    // expert's weight, divided over threads by their cost, into blocks of at most `most_block`; for `many` rows
    // `many_block` (0: none are many).
    bool build(const Plan& plan, int64_t experts, int64_t inputs, int64_t hidden, int64_t rows, int64_t most_block,
               int64_t many_block, int64_t threads) {
        int64_t limit = experts + ceil_div(plan.rows, PIECE);
        pieces = take<Piece>(limit);
        Piece* all = take<Piece>(limit);
        first = take<int64_t>(limit + 1);
        if (!pieces || !all || !first) return false;
        int64_t cost = 0;
        for (int64_t e = 0; e < experts; e++) {
            int64_t n = plan.start[e + 1] - plan.start[e];
            if (n) cost += most(n, LEAST_COST);
        }
        int64_t each = ceil_div(cost * rows, 12 * threads);
        int64_t row_bytes = (padded(inputs) + padded(hidden)) * static_cast<int64_t>(sizeof(Op));
        int64_t piece_rows = most(PIECE, PASS_BYTES / most(row_bytes, 1) / PANEL * PANEL);
        int64_t cut = 0;
        for (int64_t i = 0; i < experts; i++) {
            int64_t e = plan.order[i];
            for (int64_t row = plan.start[e]; row < plan.start[e + 1]; row += piece_rows) {
                Piece& piece = all[cut++];
                int64_t n = least(piece_rows, plan.start[e + 1] - row);
                piece.expert = e;
                piece.row = row;
                piece.n = n;
                piece.many = many_block && n >= MANY;
                piece.split();
                piece.block = least(most_block, most(PANEL, round_up(each / most(n, LEAST_COST), PANEL)));
                many |= piece.many;
                if (piece.many) piece.block = round_up(ceil_div(rows, ceil_div(rows, many_block)), PANEL);
            }
        }
        int64_t made = 0, pack_end = 0, product_end = 0, input_end = 0, hidden_end = 0;
        first[0] = 0;
        const auto units = [&](int64_t i) { return all[i].operand(inputs) + all[i].operand(hidden); };
        const auto put = [&](int64_t i) {
            Piece& piece = pieces[made++] = all[i];
            piece.input = input_end;
            piece.hidden = hidden_end;
            piece.pack_end = pack_end += piece.panels + ceil_div(piece.tail, PANEL);
            piece.product_end = product_end += ceil_div(rows, piece.block);
            most_input = most(most_input, input_end += piece.operand(inputs));
            most_hidden = most(most_hidden, hidden_end += piece.operand(hidden));
        };
        divide(cut, units, put, [&] {
            first[++count] = made;
            pack_end = product_end = input_end = hidden_end = 0;
        });
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
        int64_t place;
        const Piece& piece = find<&Piece::pack_end>(begin, end, task, place);
        float* units = inputs + piece.input;
        int64_t row = piece.row + place * PANEL, n = least(PANEL, piece.n - place * PANEL);
        if (place < piece.panels) {
            pack_rows(x, row, n, {units, piece.panels, k}, place);
        } else {
            Op* rows = reinterpret_cast<Op*>(units + piece.tail_start(k));
            stage_rows(x, row, n, k, rows + (place - piece.panels) * PANEL * row_length(k), row_length(k));
        }
    }
};

// sums [m, n] = w [m, k] times the operand of a piece's tokens t to t + n.
inline void weight_times_piece(const Lying& w, int64_t m, const Piece& piece, float* units, int64_t t, int64_t n,
                               int64_t k, Scratch& scratch, float* sums) {
    int64_t columns = least(round_up(n, PANEL), piece.panels * PANEL - t);
    const Op* rows = reinterpret_cast<const Op*>(units + piece.tail_start(k));
    Panels tokens{units, piece.panels, k};
    if (w.turned) return turned_times_tokens(w, m, tokens, t / PANEL, columns, rows, piece.tail, scratch, sums);
    weight_times_tokens(w.base, m, tokens, t / PANEL, columns, rows, piece.tail, scratch, sums);
}

}  // namespace moeplan::VARIANT
