// What Python calls: plain functions, pointers and sizes. Statuses as in common.h; `numbers`: slope, limit and shift of
// the activation.
#include <sys/syscall.h>
#include <unistd.h>

#include "arena.h"
#include "plan.h"
#include "vendor.h"

namespace moeplan {

extern const Variant variant_avx2_float, variant_avx2_bf16, variant_avx2_f16;
extern const Variant variant_avx512_float, variant_avx512_bf16, variant_avx512_f16;
extern const Variant variant_amx_bf16;

namespace {

enum Type : int64_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Level : int64_t { NONE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

thread_local int64_t bad_id = 0, multiply_adds = 0;

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// The tiles' state is large: the kernel saves it only for a process that has asked for it.
bool has_amx() {
    static const bool granted = [] {
        const long request_permission = 0x1023, tile_data = 18;
        return has_avx512_bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
               syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    }();
    return granted;
}

// Whether the vendor's library multiplies: it is here, the FFN, or the model, at least `from` wide (0: never), and the
// weights lie in the usual way.
bool vendor(int64_t from, int64_t D, int64_t H, const Layout& layout) {
    return from && most(D, H) >= from && D && H && layout.plain() && vendor_here();
}

// Best that the processor has, up to `level`.
const Variant& choose(int64_t type, int64_t level) {
    if (type == BF16) {
        if (level >= AMX && has_amx()) return variant_amx_bf16;
        return level >= AVX512 && has_avx512_bf16() ? variant_avx512_bf16 : variant_avx2_bf16;
    }
    bool wide = level >= AVX512 && has_avx512();
    if (type == F16) return wide ? variant_avx512_f16 : variant_avx2_f16;
    return wide ? variant_avx512_float : variant_avx2_float;
}

template <class Call>
int64_t run(Call& call, Status (*Variant::*entry)(const Call&), const void* ids, int64_t id_bytes, int64_t type,
            int64_t level) {
    arena_reset();
    multiply_adds = 0;
    call.plan.multiply_adds = &multiply_adds;
    Status status = make_plan(ids, id_bytes, call.T, call.K, call.E, call.plan, bad_id);
    if (status == OK) status = (choose(type, level).*entry)(call);
    arena_done();
    return status;
}

}  // namespace
}  // namespace moeplan

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace moeplan;

// Highest level that this processor runs.
EXPORT int64_t moeplan_level() { return has_amx() ? AMX : has_avx512() ? AVX512 : has_avx2() ? AVX2 : NONE; }

// The id that the calling thread's last call refused.
EXPORT int64_t moeplan_bad_id() { return bad_id; }

// Bytes of scratch that the calling thread's last call took.
EXPORT int64_t moeplan_scratch_bytes() { return arena_used(); }

// What the calling thread's last call multiplied, rows and columns that fill up tiles included.
EXPORT int64_t moeplan_multiply_adds() { return multiply_adds; }

EXPORT int64_t moeplan_forward(const void* x, const void* gate_up, const void* gate_up_bias, const void* down,
                               const void* down_bias, const void* ids, const float* weights, void* y, void* saved,
                               const float* numbers, int64_t id_bytes, int64_t type, int64_t level, int64_t threads,
                               int64_t vendor_from, int64_t act, int64_t turned, int64_t mixed, int64_t down_turned,
                               int64_t T, int64_t D, int64_t E, int64_t K, int64_t H, int64_t M) {
    Layout layout{turned, mixed, down_turned};
    Forward call{x, gate_up, gate_up_bias, down, down_bias, weights, y, saved,
                 T, D, E, K, H, M, threads, vendor(vendor_from, D, H, layout),
                 {act, numbers[0], numbers[1], numbers[2]}, layout, {}};
    return run(call, &Variant::forward, ids, id_bytes, type, level);
}

EXPORT int64_t moeplan_backward(const void* dy, const void* x, const void* gate_up, const void* down,
                                const void* down_bias, const void* saved, const void* ids, const float* weights,
                                void* dx, void* dgate_up, void* dgate_up_bias, void* ddown, void* ddown_bias,
                                float* dweights, const float* numbers, int64_t id_bytes, int64_t type, int64_t level,
                                int64_t threads, int64_t vendor_from, int64_t act, int64_t turned, int64_t mixed,
                                int64_t down_turned, int64_t T, int64_t D, int64_t E, int64_t K, int64_t H, int64_t M,
                                int64_t past_caches) {
    Layout layout{turned, mixed, down_turned};
    Backward call{dy, x, gate_up, down, down_bias, saved, weights, dx, dgate_up, dgate_up_bias, ddown, ddown_bias,
                  dweights, T, D, E, K, H, M, threads, vendor(vendor_from, D, H, layout), past_caches,
                  {act, numbers[0], numbers[1], numbers[2]}, layout, {}};
    return run(call, &Variant::backward, ids, id_bytes, type, level);
}

EXPORT int64_t moeplan_project(const void* x, const void* weight, const void* bias, const void* ids, void* y,
                               int64_t id_bytes, int64_t type, int64_t level, int64_t threads, int64_t T, int64_t E,
                               int64_t K, int64_t I, int64_t O, int64_t per_choice) {
    Project call{x, weight, bias, y, T, E, K, I, O, per_choice, threads, {}};
    return run(call, &Variant::project, ids, id_bytes, type, level);
}

EXPORT int64_t moeplan_project_backward(const void* x, const void* weight, const void* dy, const void* ids, void* dx,
                                        void* dweight, void* dbias, int64_t id_bytes, int64_t type, int64_t level,
                                        int64_t threads, int64_t T, int64_t E, int64_t K, int64_t I, int64_t O,
                                        int64_t per_choice, int64_t past_caches) {
    ProjectBackward call{x, weight, dy, dx, dweight, dbias, T, E, K, I, O, per_choice, threads, past_caches, {}};
    return run(call, &Variant::project_backward, ids, id_bytes, type, level);
}
