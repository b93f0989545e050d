// The kernels for one instruction set and one storage type. Compiled once for each row of the table in build.py, with
//   VARIANT            their namespace
//   MOEPLAN_REAL       storage type: float, bf16 or f16
//   MOEPLAN_PAIRS      1: products of bf16 pairs; 0: operands are float32
//   MOEPLAN_AMX        1: on matrix tiles
#include "backward.h"
#include "forward.h"
#include "project.h"

#define MOEPLAN_JOIN(a, b) a##b
#define MOEPLAN_NAME(variant) MOEPLAN_JOIN(variant_, variant)

namespace moeplan {
extern const Variant MOEPLAN_NAME(VARIANT) = {VARIANT::forward, VARIANT::backward, VARIANT::project,
                                              VARIANT::project_backward};
}
