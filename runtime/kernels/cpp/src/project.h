// One projection, y[t, k] = weight[e] x_row + bias[e], and its gradients.
#pragma once
#include "gradient.h"

namespace moeplan::VARIANT {

class ProjectCall {
public:
    explicit ProjectCall(const Project& p) : p(p) {}

    Status run() {
        bool ready = passes.build(p.plan, p.E, p.I, 0, p.O, BLOCK_ROWS, 0, p.threads);
        inputs = take<float>(passes.most_input);
        float* sums = take<float>(p.threads * SUMS);
        Op* staged = take<Op>(p.threads * STAGED);
        Phase* phases = take<Phase>(2 * passes.count);
        if (!ready || !inputs || !sums || !staged || !phases) return NO_MEMORY;
        for (int64_t i = 0; i < 2 * passes.count; i++) phases[i] = Phase{};
        if (p.plan.rows < p.T * p.K) clear(p.y, sizeof(Real) * p.T * p.K * p.O);
        Rows<Real> x{static_cast<const Real*>(p.x), p.I, p.per_choice ? p.plan.choice : p.plan.token};
        parallel(p.threads, [&](int64_t thread) {
            Scratch scratch{sums + thread * SUMS, staged + thread * STAGED, nullptr};
            for (int64_t pass = 0; pass < passes.count; pass++) {
                int64_t begin = passes.first[pass], end = passes.first[pass + 1];
                const Piece& last = passes.pieces[end - 1];
                Phase* phase = phases + 2 * pass;
                phase[0].run(last.pack_end, [&](int64_t task) { passes.pack(begin, end, task, x, p.I, inputs); });
                wait_for_all();
                phase[1].run(last.product_end, [&](int64_t task) { product(begin, end, task, scratch); });
                wait_for_all();
            }
            add_up(p.plan, scratch);
        });
        return OK;
    }

private:
    const Project& p;
    Passes passes;
    float* inputs = nullptr;

    void product(int64_t begin, int64_t end, int64_t task, Scratch& scratch) {
        int64_t place;
        const Piece& piece = passes.find<&Piece::product_end>(begin, end, task, place);
        int64_t o = place * piece.block, m = least(piece.block, p.O - o);
        const Real* w = static_cast<const Real*>(p.weight) + (piece.expert * p.O + o) * p.I;
        const Real* bias = p.bias ? static_cast<const Real*>(p.bias) + piece.expert * p.O + o : nullptr;
        for (int64_t t = 0; t < piece.n; t += COLUMNS) {
            int64_t n = least(COLUMNS, piece.n - t);
            weight_times_piece({w, p.I, false}, m, piece, inputs + piece.input, t, n, p.I, scratch, scratch.sums);
            by_column(scratch.sums, m, n, [&](int64_t c, int64_t r, int64_t rows, vf x) {
                if (bias) x = x + load(bias + r, rows);
                store(static_cast<Real*>(p.y) + p.plan.choice[piece.row + t + c] * p.O + o + r, x, rows);
            });
        }
    }
};

class ProjectBackwardCall {
public:
    explicit ProjectBackwardCall(const ProjectBackward& p) : p(p) {}

    Status run() {
        int64_t row_units = ((p.dx ? row_length(p.O) : 0) + (p.dweight ? p.I : 0)) / PAIR + 1;
        bool ready = owners.build(p.plan, p.E, row_units, false);
        if (p.dx) ready = ready && dx.open(p.dx, p.per_choice ? p.T * p.K : p.T, p.I);
        if (p.dx) staged = take<Op>(owners.most_rows * row_length(p.O));
        if (p.dweight) inputs = take<float>(column_panels(owners.most_depth, p.I));
        int64_t column_units = p.dweight ? GRADIENT_ROWS * row_length(owners.most_tokens) : 0;
        Op* columns = take<Op>(p.threads * column_units);
        float* sums = take<float>(p.threads * SUMS);
        float* packed = take<float>(p.threads * PACKED);
        Phase* phases = take<Phase>(5 * owners.count);
        if (!ready || !columns || !sums || !packed || !phases || (p.dx && !staged) || (p.dweight && !inputs)) {
            return NO_MEMORY;
        }
        for (int64_t i = 0; i < 5 * owners.count; i++) phases[i] = Phase{};
        parallel(p.threads, [&](int64_t thread) {
            Scratch scratch{sums + thread * SUMS, nullptr, packed + thread * PACKED};
            Op* mine = columns + thread * column_units;
            if (p.dx) dx.clear();
            for (int64_t pass = 0; pass < owners.count; pass++) {
                prepare(pass, phases + 5 * pass);
                wait_for_all();
                reduce(pass, phases + 5 * pass, mine, scratch);
                wait_for_all();
            }
            wait_for_all();  // without experts no pass has waited for the sums to be cleared
            if (p.dx) dx.round();
            add_up(p.plan, scratch);
        });
        return OK;
    }

private:
    const ProjectBackward& p;
    Owners owners;

    void prepare(int64_t pass, Phase* phase) {
        if (p.dx) {
            Rows<Real> dy{static_cast<const Real*>(p.dy), p.O, p.plan.choice};
            phase[0].run(owners.rows(pass) / STAGE_EACH,
                         [&](int64_t task) { stage(owners, pass, task, dy, p.O, staged); });
        }
        if (p.dweight) {
            Rows<Real> x{static_cast<const Real*>(p.x), p.I, p.per_choice ? p.plan.choice : p.plan.token};
            phase[1].run(owners.experts(pass) * ceil_div(p.I, COLUMNS),
                         [&](int64_t task) { pack_owner(owners, pass, task, x, p.I, inputs); });
        }
    }

    void reduce(int64_t pass, Phase* phase, Op* columns, Scratch& scratch) {
        Rows<Real> dy{static_cast<const Real*>(p.dy), p.O, p.plan.choice};
        if (p.dweight) {
            int64_t blocks = ceil_div(p.O, GRADIENT_ROWS);
            phase[2].run(owners.experts(pass) * blocks, [&](int64_t task) {
                const Owner& owner = owners.all[owners.begin(pass) + task / blocks];
                int64_t o = task % blocks * GRADIENT_ROWS;
                weight_gradient(owner, dy, owner.row, o, least(GRADIENT_ROWS, p.O - o),
                                owner_panels(owner, inputs, p.I), p.I, columns, scratch,
                                static_cast<Real*>(p.dweight) + (owner.expert * p.O + o) * p.I, 0,
                                p.past_caches && whole_lines(p.dweight, p.I));
            });
        }
        if (p.dbias) {
            int64_t blocks = ceil_div(p.O, GRADIENT_COLUMNS);
            phase[3].run(owners.experts(pass) * blocks, [&](int64_t task) {
                const Owner& owner = owners.all[owners.begin(pass) + task / blocks];
                int64_t o = task % blocks * GRADIENT_COLUMNS;
                row_sums(dy, owner.row, owner.n, o, least(GRADIENT_COLUMNS, p.O - o), nullptr,
                         static_cast<Real*>(p.dbias) + owner.expert * p.O);
            });
        }
        if (p.dx) {
            int64_t width = wide_columns(p.I, p.threads, owners.columns);
            phase[4].run(ceil_div(p.I, width), [&](int64_t task) {
                int64_t i = task * width;
                for (int64_t e = 0; e < owners.experts(pass); e++) {
                    const Owner& owner = owners.all[owners.begin(pass) + from_both_ends(e, owners.experts(pass))];
                    input_gradient(owner, p.per_choice ? p.plan.choice : p.plan.token, staged,
                                   static_cast<const Real*>(p.weight) + owner.expert * p.O * p.I, false, p.O, i,
                                   least(width, p.I - i), scratch, dx);
                }
            });
        }
    }

    Sums dx;
    Op* staged = nullptr;      // rows of dy
    float* inputs = nullptr;   // panels of x along its rows
};

inline Status project(const Project& p) { return ProjectCall(p).run(); }
inline Status project_backward(const ProjectBackward& p) { return ProjectBackwardCall(p).run(); }

}  // namespace moeplan::VARIANT
