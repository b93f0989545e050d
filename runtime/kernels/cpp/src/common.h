// What every file of the kernels shares. Letters: T tokens, D model, E experts held here, K top-k, H ffn columns,
// M 2 for a gated FFN (gate, then up) or 1, P = T K choices.
//
// No standard library templates in here or in the files compiled for one instruction set, and what is inline is static:
// of a shared inline function the linker keeps one copy, perhaps one that an older processor cannot run.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace moeplan {

enum Act : int64_t { SILU = 0, GELU = 1, RELU = 2, SWIGLU_CLAMPED = 3, GELU_TANH = 4, RELU2 = 5 };
enum Status : int64_t { OK = 0, BAD_ID = 1, NO_MEMORY = 2 };

// Columns of a panel: the operand that is packed lies as panels [k][16] of 32-bit units, one cache line for each k.
constexpr int64_t PANEL = 16;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Masked and tile instructions are not seen by the address sanitizer: it sees this look at both ends instead.
static inline void touch([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    const volatile char* end = static_cast<const volatile char*>(p);
    if (bytes > 0) (void)(end[0] + end[bytes - 1]);
#endif
}
// Of nothing, the pointer may be null.
static inline void clear(void* p, int64_t bytes) {
    if (bytes > 0) memset(p, 0, bytes);
}

// An activation; its numbers count for SWIGLU_CLAMPED: gate at most `limit`, up within it, (up + shift) gate
// sigmoid(slope gate).
struct Activation {
    int64_t kind;
    float slope, limit, shift;
};

// How the weights of an FFN lie. `turned`: gate and up as [D, M H], else [M H, D]; `mixed`: of these M H, gate 0, up 0,
// gate 1, ..., else all of gate first; `down_turned`: down as [H, D], else [D, H].
struct Layout {
    int64_t turned, mixed, down_turned;
    bool plain() const { return !turned && !mixed && !down_turned; }
};

// Choices sorted by expert, stably; those that are not here (-1) are left out.
struct Plan {
    int64_t rows = 0;               // choices that are here
    const int32_t* choice = nullptr;  // [rows] which of the P choices
    const int32_t* token = nullptr;   // [rows] which of the T tokens
    const int64_t* start = nullptr;   // [E + 1] first row of each expert
    const int32_t* order = nullptr;   // [E] experts, from the fewest rows to the most
    int64_t* multiply_adds = nullptr;  // of the call's products, with what tiles add; threads add theirs
};

// Fused FFN. Pointers are to the storage type of the variant unless typed; `*_bias` may be null. `vendor`: the
// vendor's library multiplies many float32 rows.
struct Forward {
    const void *x, *gate_up, *gate_up_bias, *down, *down_bias;
    const float* weights;  // [P]
    void *y, *saved;       // [T, D]; [P, M H] in the plan's order, all of gate first, or null
    int64_t T, D, E, K, H, M, threads, vendor;
    Activation act;
    Layout layout;
    Plan plan;
};

// Its gradients; `dy` and `dx` are [T, D], the others have the shapes of what they belong to, and the weights' and
// `dgate_up_bias` lie as the weights do. Biases may be null.
// `past_caches`: gradients of weights are written past the caches.
struct Backward {
    const void *dy, *x, *gate_up, *down, *down_bias, *saved;
    const float* weights;
    void *dx, *dgate_up, *dgate_up_bias, *ddown, *ddown_bias;
    float* dweights;
    int64_t T, D, E, K, H, M, threads, vendor, past_caches;
    Activation act;
    Layout layout;
    Plan plan;
};

// One projection: y [P, O] from x, which has a row for each token, or for each choice (`per_choice`).
struct Project {
    const void *x, *weight, *bias;
    void* y;
    int64_t T, E, K, I, O, per_choice, threads;
    Plan plan;
};

// Its gradients from dy [P, O]; each of dx, dweight and dbias may be null, and then so may what only it needs.
struct ProjectBackward {
    const void *x, *weight, *dy;
    void *dx, *dweight, *dbias;
    int64_t T, E, K, I, O, per_choice, threads, past_caches;
    Plan plan;
};

// The kernels for one storage type and one instruction set.
struct Variant {
    Status (*forward)(const Forward&);
    Status (*backward)(const Backward&);
    Status (*project)(const Project&);
    Status (*project_backward)(const ProjectBackward&);
};

}  // namespace moeplan
