// Gradients of the fused FFN, from the projections that the forward kept.
//
// For each expert, with rows of dy, x and the kept projections (gate, up):
//   dhidden = dy down;  dweights = dhidden . act(gate, up) + dy . down_bias
//   dgate, dup from weights dhidden through the activation
//   dgate_up = (dgate, dup)^T x;  ddown = dy^T (weights act(gate, up));  dx += (dgate, dup) gate_up
// A pass stages rows for some experts, then makes dhidden and everything that is element-wise, then the rest.
#pragma once
#include "activation.h"
#include "gradient.h"

namespace moeplan::VARIANT {

constexpr int64_t HIDDEN_COLUMNS = 256;  // columns of dhidden in a block

class BackwardCall {
public:
    explicit BackwardCall(const Backward& b)
        : b(b), mixed(b.layout.mixed && b.M == 2), width(b.M * b.H), blocks(ceil_div(b.H, HIDDEN_COLUMNS)) {}

    Status run() {
        int64_t row_units = (row_length(b.D) + b.D + row_length(width) + b.H) / PAIR + 1;
        bool ready = owners.build(b.plan, b.E, row_units, b.vendor && vendor_multiplies) && dx.open(b.dx, b.T, b.D);
        dy = take<Op>(owners.most_rows * row_length(b.D));
        dprojected = take<Op>(owners.most_rows * row_length(width));
        inputs = take<float>(column_panels(owners.most_depth, b.D));
        hidden = take<float>(column_panels(owners.most_depth, b.H));
        shares = take<float>(b.plan.rows * blocks);
        int64_t column_units = GRADIENT_ROWS * row_length(owners.most_tokens);
        Op* staged = take<Op>(b.threads * column_units);
        int64_t per_thread = owners.many ? most(SUMS, MANY_ROWS * MANY_COLUMNS) : SUMS;
        float* sums = take<float>(b.threads * per_thread);
        float* packed = take<float>(b.threads * PACKED);
        Phase* phases = take<Phase>(PHASES * owners.count);
        together = owners.many ? MANY_COLUMNS / HIDDEN_COLUMNS : blocks_together();
        columns = owners.many ? many_columns(b.D, b.threads) : wide_columns(b.D, b.threads, owners.columns);
        if (!ready || !dy || !dprojected || !inputs || !hidden || !shares || !staged || !sums || !packed || !phases) {
            return NO_MEMORY;
        }
        for (int64_t i = 0; i < PHASES * owners.count; i++) phases[i] = Phase{};
        clear(b.dweights, sizeof(float) * b.T * b.K);
        parallel(b.threads, [&](int64_t thread) {
            Scratch scratch{sums + thread * per_thread, nullptr, packed + thread * PACKED};
            Op* mine = staged + thread * column_units;
            dx.clear();
            for (int64_t pass = 0; pass < owners.count; pass++) {
                Phase* phase = phases + PHASES * pass;
                prepare(pass, phase);
                wait_for_all();
                int64_t groups = ceil_div(blocks, together);
                phase[2].run(owners.experts(pass) * groups, [&](int64_t task) {
                    activations(owner(pass, task / groups), task % groups * together, scratch);
                });
                wait_for_all();
                weights_gradients(pass, phase + 3, mine, scratch);
                bias_gradients(pass, phase + 5);
                phase[7].run(ceil_div(b.D, columns), [&](int64_t task) { inputs_gradient(pass, task, scratch); });
                phase[8].run(owners.experts(pass), [&](int64_t task) { gates_gradient(pass, task); });
                wait_for_all();
            }
            wait_for_all();  // without experts no pass has waited for the sums to be cleared
            dx.round();
            add_up(b.plan, scratch);
        });
        return OK;
    }

private:
    static constexpr int64_t PHASES = 9;
    const Backward& b;
    const bool mixed;
    const int64_t width, blocks;  // M H; blocks of H
    int64_t together = 0, columns = 0;  // in a task: blocks of H; columns of dx
    Owners owners;
    Sums dx;
    Op *dy = nullptr, *dprojected = nullptr;       // staged rows
    float *inputs = nullptr, *hidden = nullptr;    // panels along the rows: x; weights act(gate, up)
    float* shares = nullptr;                       // [rows, blocks] dhidden . act(gate, up) of each block of H

    const Owner& owner(int64_t pass, int64_t i) const { return owners.all[owners.begin(pass) + i]; }
    float weight(int64_t row) const { return b.weights[b.plan.choice[row]]; }

    // Blocks of H in a task: as many as a block of sums has, and two tasks, at least, for each thread.
    int64_t blocks_together() const {
        return most(1, least(owners.columns / HIDDEN_COLUMNS, owners.busy * blocks / (2 * b.threads)));
    }

    void prepare(int64_t pass, Phase* phase) {
        Rows<Real> from{static_cast<const Real*>(b.dy), b.D, b.plan.token};
        phase[0].run(owners.rows(pass) / STAGE_EACH, [&](int64_t task) {
            stage(owners, pass, task, from, b.D, dy);
            // The rest of each row of dprojected, which products read.
            for (int64_t r = task * STAGE_EACH; r < (task + 1) * STAGE_EACH; r++) {
                clear(dprojected + r * row_length(width) + width, sizeof(Op) * (row_length(width) - width));
            }
        });
        Rows<Real> x{static_cast<const Real*>(b.x), b.D, b.plan.token};
        phase[1].run(owners.experts(pass) * ceil_div(b.D, COLUMNS),
                     [&](int64_t task) { pack_owner(owners, pass, task, x, b.D, inputs); });
    }

    // Blocks of dhidden for an expert's rows, and everything that follows element by element.
    void activations(const Owner& own, int64_t first, Scratch& scratch) {
        int64_t end = least(blocks, first + together);
        if (own.many) return activations_many(own, first * HIDDEN_COLUMNS, least(end * HIDDEN_COLUMNS, b.H), scratch);
        int64_t blocks_each = least(together, block_columns(own.n) / HIDDEN_COLUMNS);
        for (int64_t block = first; block < end; block += blocks_each) {
            int64_t h = block * HIDDEN_COLUMNS;
            activations_of(own, h, least(blocks_each * HIDDEN_COLUMNS, b.H - h), scratch);
        }
    }

    // Columns h to `end`, of which the first starts a block, for many rows.
    void activations_many(const Owner& own, int64_t h, int64_t end, Scratch& scratch) {
        int64_t n = end - h;
        Matrix<Real> down{static_cast<const Real*>(b.down) + own.expert * b.D * b.H + h, b.H};
        Panels panels = owner_panels(own, hidden, b.H);
        for (int64_t r = 0; r < own.n; r += MANY_ROWS) {
            int64_t m = least(MANY_ROWS, own.n - r);
            Matrix<Op> rows{dy + (own.padded_row + r) * row_length(b.D), row_length(b.D)};
            multiply_many(rows, down, m, n, b.D, scratch, scratch.sums, n);
            for (int64_t j = 0; j < m; j++) {
                for (int64_t c = 0; c < n; c += LANES) {
                    int64_t block = (h + c) / HIDDEN_COLUMNS;
                    if (c % HIDDEN_COLUMNS == 0) shares[(own.row + r + j) * blocks + block] = 0;
                    vf x = element(own, r + j, scratch.sums + j * n, block, h, c, n);
                    store(panels.at((h + c) / PANEL, r + j) + c % PANEL, x);
                }
            }
        }
    }

    // Columns h to h + n, of which the first starts a block of H, and all are in one block of sums.
    void activations_of(const Owner& own, int64_t h, int64_t n, Scratch& scratch) {
        const Real* down = static_cast<const Real*>(b.down) + own.expert * b.D * b.H;
        Panels panels = owner_panels(own, hidden, b.H);
        int64_t line = block_line(own.n);
        for (int64_t r = 0; r < own.n; r += BLOCK_ROWS) {
            int64_t m = least(BLOCK_ROWS, own.n - r);
            const Op* rows = dy + (own.padded_row + r) * row_length(b.D);
            if (b.layout.down_turned) {
                rows_times_turned(rows, row_length(b.D), m, down + h * b.D, b.D, b.D, n, scratch, scratch.sums, line);
            } else {
                rows_times_weight(rows, row_length(b.D), m, down + h, b.H, b.D, n, scratch, scratch.sums, line);
            }
            for (int64_t j = 0; j < m; j += PAIR) {
                for (int64_t c = 0; c < n; c += LANES) {
                    int64_t block = (h + c) / HIDDEN_COLUMNS;
                    bool below = PAIR == 2 && j + 1 < m;
                    if (c % HIDDEN_COLUMNS == 0) {
                        shares[(own.row + r + j) * blocks + block] = 0;
                        if (below) shares[(own.row + r + j + 1) * blocks + block] = 0;
                    }
                    vf x = element(own, r + j, scratch.sums + j * line, block, h, c, n);
#if MOEPLAN_PAIRS
                    const float* next = scratch.sums + (j + 1) * line;
                    x = interleave(x, below ? element(own, r + j + 1, next, block, h, c, n) : zero());
#endif
                    store(panels.at((h + c) / PANEL, (r + j) / PAIR) + c % PANEL, x);
                }
            }
        }
        // Units between the last row and the end of each panel.
        for (int64_t u = ceil_div(own.n, PAIR); u < panels.units(); u++) {
            for (int64_t c = 0; c < round_up(n, PANEL); c += LANES) {
                store(panels.at((h + c) / PANEL, u) + c % PANEL, zero());
            }
        }
    }

    // Of one row, from column h + c: sets dprojected, in the weight's order, adds to `shares`, returns weights act(gate, up).
    vf element(const Owner& own, int64_t r, const float* dhidden, int64_t block, int64_t h, int64_t c, int64_t n) {
        int64_t row = own.row + r, count = least(LANES, n - c);
        const Real* gate = static_cast<const Real*>(b.saved) + row * width + h + c;
        Op* out = dprojected + (own.padded_row + r) * row_length(width) + (mixed ? b.M : 1) * (h + c);
        vf w = splat(weight(row)), d = load(dhidden + c, count), result, dgate, dup;
        vf up = b.M == 2 ? load(gate + b.H, count) : zero();
        activate_backward(b.act, b.M == 2, load(gate, count), up, d * w, result, dgate, dup);
        if (mixed) {
            Op gates[LANES], ups[LANES];
            store(gates, dgate);
            store(ups, dup);
            for (int64_t j = 0; j < count; j++) {
                out[2 * j] = gates[j];
                out[2 * j + 1] = ups[j];
            }
        } else {
            store(out, dgate, count);
            if (b.M == 2) store(out + b.H, dup, count);
        }
        shares[row * blocks + block] += sum(d * result);
        return w * result;
    }

    // Where row `row` of an expert's [rows, columns] begins, or, turned, its column.
    static Real* place(void* of, int64_t expert, int64_t row, int64_t rows, int64_t columns, bool turned) {
        return static_cast<Real*>(of) + expert * rows * columns + row * (turned ? 1 : columns);
    }

    void weights_gradients(int64_t pass, Phase* phase, Op* staged, Scratch& scratch) {
        int64_t tall = ceil_div(width, GRADIENT_ROWS), wide = ceil_div(b.D, GRADIENT_ROWS);
        phase[0].run(owners.experts(pass) * tall, [&](int64_t task) {
            const Owner& own = owner(pass, task / tall);
            int64_t o = task % tall * GRADIENT_ROWS;
            weight_gradient(own, Rows<Op>{dprojected, row_length(width), nullptr}, own.padded_row, o,
                            least(GRADIENT_ROWS, width - o), owner_panels(own, inputs, b.D), b.D, staged,
                            scratch, place(b.dgate_up, own.expert, o, width, b.D, b.layout.turned),
                            b.layout.turned ? width : 0,
                            !b.layout.turned && b.past_caches && whole_lines(b.dgate_up, b.D));
        });
        phase[1].run(owners.experts(pass) * wide, [&](int64_t task) {
            const Owner& own = owner(pass, task / wide);
            int64_t d = task % wide * GRADIENT_ROWS;
            weight_gradient(own, Rows<Op>{dy, row_length(b.D), nullptr}, own.padded_row, d,
                            least(GRADIENT_ROWS, b.D - d), owner_panels(own, hidden, b.H), b.H, staged,
                            scratch, place(b.ddown, own.expert, d, b.D, b.H, b.layout.down_turned),
                            b.layout.down_turned ? b.D : 0,
                            !b.layout.down_turned && b.past_caches && whole_lines(b.ddown, b.H));
        });
    }

    void bias_gradients(int64_t pass, Phase* phase) {
        if (b.dgate_up_bias) {
            int64_t count = ceil_div(width, GRADIENT_COLUMNS);
            phase[0].run(owners.experts(pass) * count, [&](int64_t task) {
                const Owner& own = owner(pass, task / count);
                int64_t o = task % count * GRADIENT_COLUMNS;
                row_sums(Rows<Op>{dprojected, row_length(width), nullptr}, own.padded_row, own.n, o,
                         least(GRADIENT_COLUMNS, width - o), nullptr,
                         static_cast<Real*>(b.dgate_up_bias) + own.expert * width);
            });
        }
        if (b.ddown_bias) {
            int64_t count = ceil_div(b.D, GRADIENT_COLUMNS);
            phase[1].run(owners.experts(pass) * count, [&](int64_t task) {
                const Owner& own = owner(pass, task / count);
                int64_t d = task % count * GRADIENT_COLUMNS;
                auto each = [&](int64_t row) { return weight(own.row + row - own.padded_row); };
                row_sums(Rows<Op>{dy, row_length(b.D), nullptr}, own.padded_row, own.n, d,
                         least(GRADIENT_COLUMNS, b.D - d), each, static_cast<Real*>(b.ddown_bias) + own.expert * b.D);
            });
        }
    }

    void inputs_gradient(int64_t pass, int64_t task, Scratch& scratch) {
        int64_t d = task * columns;
        for (int64_t i = 0; i < owners.experts(pass); i++) {
            const Owner& own = owner(pass, from_both_ends(i, owners.experts(pass)));
            const Real* gate_up = static_cast<const Real*>(b.gate_up) + own.expert * width * b.D;
            input_gradient(own, b.plan.token, dprojected, gate_up, b.layout.turned, width, d, least(columns, b.D - d), scratch, dx);
        }
    }

    void gates_gradient(int64_t pass, int64_t task) {
        const Owner& own = owner(pass, task);
        const Real* bias = b.down_bias ? static_cast<const Real*>(b.down_bias) + own.expert * b.D : nullptr;
        for (int64_t r = 0; r < own.n; r++) {
            int64_t row = own.row + r;
            vf total = zero();
            const Op* from = dy + (own.padded_row + r) * row_length(b.D);
            for (int64_t d = 0; bias && d < b.D; d += LANES) {
                int64_t count = least(LANES, b.D - d);
                total = fma(load(from + d, count), load(bias + d, count), total);
            }
            float share = sum(total);
            for (int64_t i = 0; i < blocks; i++) share += shares[row * blocks + i];
            b.dweights[b.plan.choice[row]] = share;
        }
    }
};

inline Status backward(const Backward& b) { return BackwardCall(b).run(); }

}  // namespace moeplan::VARIANT
