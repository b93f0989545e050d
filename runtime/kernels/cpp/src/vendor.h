// The vendor's product of float32 matrices: MKL's, which torch's builds for x86 carry.
#pragma once
#include "common.h"

extern "C" {
// Weak: null where torch's library does not have them. The second one tells MKL from other libraries.
__attribute__((weak, visibility("default"))) void sgemm_(const char* turn_a, const char* turn_b, const int* m,
                                                         const int* n, const int* k, const float* alpha,
                                                         const float* a, const int* lda, const float* b,
                                                         const int* ldb, const float* beta, float* c, const int* ldc);
__attribute__((weak, visibility("default"))) void MKL_Set_Num_Threads_Local(int threads);
}

namespace moeplan {

// Whether it is here, and made for this processor.
static inline bool vendor_here() { return sgemm_ && MKL_Set_Num_Threads_Local && __builtin_cpu_is("intel"); }

// c [m, n] = a [m, k] b [k, n], all row-major; `turned`: what lies there is the transpose. The library's matrices are
// column-major, so it multiplies the transposes. Called by a thread of a parallel region it stays on that thread.
static inline void vendor_product(const float* a, int64_t lda, bool turned_a, const float* b, int64_t ldb,
                                  bool turned_b, int64_t m, int64_t n, int64_t k, float* c, int64_t ldc) {
    touch(a, sizeof(float) * (turned_a ? (k - 1) * lda + m : (m - 1) * lda + k));
    touch(b, sizeof(float) * (turned_b ? (n - 1) * ldb + k : (k - 1) * ldb + n));
    touch(c, sizeof(float) * ((m - 1) * ldc + n));
    const int rows = static_cast<int>(m), columns = static_cast<int>(n), depth = static_cast<int>(k);
    const int stride_a = static_cast<int>(lda), stride_b = static_cast<int>(ldb), stride_c = static_cast<int>(ldc);
    const float one = 1.0f, none = 0.0f;
    sgemm_(turned_b ? "T" : "N", turned_a ? "T" : "N", &columns, &rows, &depth, &one, b, &stride_b, a, &stride_a, &none,
           c, &stride_c);
}

}  // namespace moeplan
