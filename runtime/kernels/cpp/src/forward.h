// y[t] = sum over k of weights[t, k] (down[e] act(gate_up[e] x[t] + b) + b2), in one call.
//
// A pass packs the tokens of its experts, multiplies gate and up and applies the activation while the sums are in the
// cache, which leaves the hidden rows packed for the second product, and adds its result, weighted, into y. Weights
// are read where they lie, in any layout. Tasks of the last step own columns of y and take the experts in order: no two
// threads add to one place, and results do not depend on the number of threads, but for the last digits of what the vendor's library
// multiplies.
#pragma once
#include "activation.h"
#include "passes.h"

namespace moeplan::VARIANT {

constexpr int64_t FFN_ROWS = BLOCK_ROWS / 2;  // rows of gate, and of up, in a block of sums

class ForwardCall {
public:
    explicit ForwardCall(const Forward& f) : f(f), mixed(f.layout.mixed && f.M == 2) {}

    Status run() {
        int64_t many_block = f.vendor && vendor_multiplies ? MANY_COLUMNS : 0;
        bool ready = passes.build(f.plan, f.E, f.D, f.H, f.H, FFN_ROWS, many_block, f.threads);
        ready = ready && y.open(f.y, f.T, f.D);
        int64_t per_thread = passes.many ? most(SUMS, MANY_ROWS * f.M * MANY_COLUMNS) : SUMS;
        inputs = take<float>(passes.most_input);
        hidden = take<float>(passes.most_hidden);
        float* sums = take<float>(f.threads * per_thread);
        Op* staged = take<Op>(f.threads * STAGED);
        Phase* phases = take<Phase>(3 * passes.count);
        if (!ready || !inputs || !hidden || !sums || !staged || !phases) return NO_MEMORY;
        for (int64_t i = 0; i < 3 * passes.count; i++) phases[i] = Phase{};
        columns = passes.many ? many_columns(f.D, f.threads) : task_columns(f.D, f.threads);
        Rows<Real> x{static_cast<const Real*>(f.x), f.D, f.plan.token};
        parallel(f.threads, [&](int64_t thread) {
            Scratch scratch{sums + thread * per_thread, staged + thread * STAGED, nullptr};
            y.clear();
            for (int64_t p = 0; p < passes.count; p++) {
                int64_t begin = passes.first[p], end = passes.first[p + 1];
                const Piece& last = passes.pieces[end - 1];
                Phase* phase = phases + 3 * p;
                phase[0].run(last.pack_end, [&](int64_t task) { passes.pack(begin, end, task, x, f.D, inputs); });
                wait_for_all();
                phase[1].run(last.product_end, [&](int64_t task) { project(begin, end, task, scratch); });
                wait_for_all();
                phase[2].run(ceil_div(f.D, columns), [&](int64_t task) { add(begin, end, task, scratch); });
            }
            wait_for_all();
            y.round();
            add_up(f.plan, scratch);
        });
        return OK;
    }

private:
    const Forward& f;
    const bool mixed;
    Passes passes;
    Sums y;
    float *inputs = nullptr, *hidden = nullptr;
    int64_t columns = 0;

    // Some rows of gate, and of up, for all tokens of a piece; the activation; their place in the hidden rows.
    void project(int64_t begin, int64_t end, int64_t task, Scratch& scratch) {
        int64_t place;
        const Piece& piece = passes.find<&Piece::product_end>(begin, end, task, place);
        int64_t h = place * piece.block, m = least(piece.block, f.H - h);
        if (piece.many) return project_many(piece, h, m, scratch);
        for (int64_t t = 0; t < piece.n; t += COLUMNS) {
            int64_t n = least(COLUMNS, piece.n - t);
            float* x = inputs + piece.input;
            if (mixed) weight_times_piece(gate_up(piece, 0, h), f.M * m, piece, x, t, n, f.D, scratch, scratch.sums);
            for (int64_t i = 0; i < f.M; i++) {
                float* sums = scratch.sums + row_of(i, 0) * LINE;
                if (!mixed) weight_times_piece(gate_up(piece, i, h), m, piece, x, t, n, f.D, scratch, sums);
                finish(sums, piece, i, h, m, t, n);
            }
            int64_t columns = least(n, piece.panels * PANEL - t);
            activate_panels(scratch.sums, piece, h, m, t, columns);
            if (piece.tail) activate_rows(scratch.sums + columns, piece, h, m);
        }
    }

    // Rows h and after of matrix i, or of both where they are mixed.
    Lying gate_up(const Piece& piece, int64_t i, int64_t h) const {
        const Real* base = static_cast<const Real*>(f.gate_up) + piece.expert * f.M * f.H * f.D;
        int64_t row = mixed ? h * f.M : i * f.H + h;
        return f.layout.turned ? Lying{base + row, f.M * f.H, true} : Lying{base + row * f.D, f.D, false};
    }

    // Row of a block of sums that has row r of matrix i, and what is between two of one matrix.
    int64_t row_of(int64_t i, int64_t r) const { return mixed ? r * f.M + i : i * FFN_ROWS + r; }
    int64_t line() const { return mixed ? f.M * LINE : LINE; }

    // Adds the bias of matrix i and keeps the projections for the backward where they are asked for.
    void finish(float* sums, const Piece& piece, int64_t i, int64_t h, int64_t m, int64_t t, int64_t n) {
        if (f.gate_up_bias) {
            const Real* bias = static_cast<const Real*>(f.gate_up_bias) + (piece.expert * f.M + i) * f.H + h;
            for (int64_t r = 0; r < m; r++) {
                vf b = splat(scalar(bias[r]));
                float* row = sums + r * line();
                for (int64_t c = 0; c < n; c += LANES) store(row + c, load(row + c) + b);
            }
        }
        if (f.saved) {
            Real* saved = static_cast<Real*>(f.saved) + (piece.row + t) * f.M * f.H + i * f.H + h;
            by_column(sums, m, n, [&](int64_t c, int64_t r, int64_t rows, vf x) {
                store(saved + c * f.M * f.H + r, x, rows);
            }, line());
        }
    }

    vf activated(const float* sums, int64_t r, int64_t c) const {
        const float *gate = sums + row_of(0, r) * LINE + c, *up = sums + row_of(1, r) * LINE + c;
        return activate(f.act, f.M == 2, load(gate), f.M == 2 ? load(up) : zero());
    }

    void activate_panels(const float* sums, const Piece& piece, int64_t h, int64_t m, int64_t t, int64_t n) {
        Panels panels{hidden + piece.hidden, piece.panels, f.H};
        for (int64_t c = 0; c < round_up(n, PANEL); c += LANES) {
            for (int64_t r = 0; r < m; r += PAIR) {
                vf x = activated(sums, r, c);
#if MOEPLAN_PAIRS
                x = interleave(x, r + 1 < m ? activated(sums, r + 1, c) : zero());
#endif
                store(panels.at((t + c) / PANEL, (h + r) / PAIR) + c % PANEL, x);
            }
            if (h + m == f.H) {
                for (int64_t u = ceil_div(f.H, PAIR); u < panels.units(); u++) {
                    store(panels.at((t + c) / PANEL, u) + c % PANEL, zero());
                }
            }
        }
    }

    void activate_rows(const float* sums, const Piece& piece, int64_t h, int64_t m) {
        Op* rows = reinterpret_cast<Op*>(hidden + piece.hidden + piece.tail_start(f.H));
        int64_t stride = row_length(f.H);
        for (int64_t r = 0; r < m; r++) {
            Op column[PANEL];
            for (int64_t c = 0; c < piece.tail; c += LANES) store(column + c, activated(sums, r, c));
            for (int64_t c = 0; c < piece.tail; c++) rows[c * stride + h + r] = column[c];
        }
        if (h + m == f.H) {
            for (int64_t c = 0; c < piece.tail; c++) clear(rows + c * stride + f.H, sizeof(Op) * (stride - f.H));
        }
    }

    // The same for many tokens: rows of sums, and of the operand that comes of them, are tokens.
    void project_many(const Piece& piece, int64_t h, int64_t m, Scratch& scratch) {
        for (int64_t t = 0; t < piece.n; t += MANY_ROWS) {
            int64_t n = least(MANY_ROWS, piece.n - t), line = f.M * m;
            Matrix<float> x{inputs + piece.input + t * row_length(f.D), row_length(f.D)};
            for (int64_t i = 0; i < f.M; i++) {
                const Real* w = static_cast<const Real*>(f.gate_up) + ((piece.expert * f.M + i) * f.H + h) * f.D;
                multiply_many(x, Matrix<Real>{w, f.D, true}, n, m, f.D, scratch, scratch.sums + i * m, line);
            }
            for (int64_t r = 0; r < n; r++) {
                float* row = scratch.sums + r * line;
                for (int64_t i = 0; i < f.M; i++) finish_row(row + i * m, piece, i, h, m, t + r);
                float* out = hidden + piece.hidden + (t + r) * row_length(f.H) + h;
                for (int64_t c = 0; c < m; c += LANES) {
                    int64_t count = least(LANES, m - c);
                    vf up = f.M == 2 ? load(row + m + c, count) : zero();
                    store(out + c, activate(f.act, f.M == 2, load(row + c, count), up), count);
                }
            }
        }
    }

    // As `finish`, of one token's row.
    void finish_row(float* sums, const Piece& piece, int64_t i, int64_t h, int64_t m, int64_t token) {
        if (f.gate_up_bias) {
            const Real* bias = static_cast<const Real*>(f.gate_up_bias) + (piece.expert * f.M + i) * f.H + h;
            for (int64_t c = 0; c < m; c += LANES) {
                int64_t count = least(LANES, m - c);
                store(sums + c, load(sums + c, count) + load(bias + c, count), count);
            }
        }
        if (f.saved) {
            Real* saved = static_cast<Real*>(f.saved) + (piece.row + token) * f.M * f.H + i * f.H + h;
            for (int64_t c = 0; c < m; c += LANES) {
                store(saved + c, load(sums + c, least(LANES, m - c)), least(LANES, m - c));
            }
        }
    }

    // Columns of y: the second product for all tokens of the pass, weighted.
    void add(int64_t begin, int64_t end, int64_t task, Scratch& scratch) {
        int64_t d = task * columns, m = least(columns, f.D - d);
        for (int64_t i = 0; i < end - begin; i++) {
            const Piece& piece = passes.pieces[begin + from_both_ends(i, end - begin)];
            if (piece.many) {
                add_many(piece, d, m, scratch);
            } else {
                for (int64_t r = 0; r < m; r += BLOCK_ROWS) add_columns(piece, d + r, least(BLOCK_ROWS, m - r), scratch);
            }
        }
    }

    void add_columns(const Piece& piece, int64_t d, int64_t m, Scratch& scratch) {
        const Real* of_expert = static_cast<const Real*>(f.down) + piece.expert * f.D * f.H;
        Lying w = f.layout.down_turned ? Lying{of_expert + d, f.D, true} : Lying{of_expert + d * f.H, f.H, false};
        const Real* bias = down_bias(piece, d);
        for (int64_t t = 0; t < piece.n; t += COLUMNS) {
            int64_t n = least(COLUMNS, piece.n - t), row = piece.row + t;
            weight_times_piece(w, m, piece, hidden + piece.hidden, t, n, f.H, scratch, scratch.sums);
            by_column(scratch.sums, m, n, [&](int64_t c, int64_t r, int64_t rows, vf x) {
                add_vector(row + c, d + r, rows, bias ? x + load(bias + r, rows) : x);
            });
        }
    }

    void add_many(const Piece& piece, int64_t d, int64_t m, Scratch& scratch) {
        const Real* w = static_cast<const Real*>(f.down) + (piece.expert * f.D + d) * f.H;
        const Real* bias = down_bias(piece, d);
        for (int64_t t = 0; t < piece.n; t += MANY_ROWS) {
            int64_t n = least(MANY_ROWS, piece.n - t);
            Matrix<float> rows{hidden + piece.hidden + t * row_length(f.H), row_length(f.H)};
            multiply_many(rows, Matrix<Real>{w, f.H, true}, n, m, f.H, scratch, scratch.sums, m);
            for (int64_t r = 0; r < n; r++) {
                for (int64_t c = 0; c < m; c += LANES) {
                    int64_t count = least(LANES, m - c);
                    vf x = load(scratch.sums + r * m + c, count);
                    add_vector(piece.row + t + r, d + c, count, bias ? x + load(bias + c, count) : x);
                }
            }
        }
    }

    const Real* down_bias(const Piece& piece, int64_t d) const {
        return f.down_bias ? static_cast<const Real*>(f.down_bias) + piece.expert * f.D + d : nullptr;
    }

    // y of the token of a row, from column d on, plus its gate weight times x.
    void add_vector(int64_t row, int64_t d, int64_t count, vf x) {
        float* to = y.values + f.plan.token[row] * f.D + d;
        store(to, fma(splat(f.weights[f.plan.choice[row]]), x, load(to, count)), count);
    }
};

inline Status forward(const Forward& f) { return ForwardCall(f).run(); }

}  // namespace moeplan::VARIANT
