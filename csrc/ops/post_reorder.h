// What post_reorder's CPU and CUDA halves share: the order of its parameters and its scalars.
#pragma once

#include "core/op.h"

namespace epmoe::post_reorder {

enum Param {
  kDownOutput,
  kOutput,
  kSrc2dst,
  kTopkIds,
  kTopkWeights,
  kStartExpertId,
  kEndExpertId,
  kDstStart,
  kRoutedScalingFactor,
  kNumerics,
};
enum Axis { kRows, kHidden, kTokens, kTopk };
enum Numerics { kFp32, kTriton };

// A row index that no slot has: a remote expert's slot, or one that was reported and skipped.
constexpr uint32_t kNoRow = 0xffffffffu;

struct Problem {
  int64_t tokens, hidden, topk, rows;
  int64_t start_expert_id, end_expert_id, dst_start;
  float factor;
  Numerics numerics;
};

inline Problem problem_of(const Call &call) {
  return {call.axes[kTokens],
          call.axes[kHidden],
          call.axes[kTopk],
          call.axes[kRows],
          call.integers[kStartExpertId],
          call.integers[kEndExpertId],
          call.integers[kDstStart],
          static_cast<float>(call.reals[kRoutedScalingFactor]),
          static_cast<Numerics>(call.integers[kNumerics])};
}

}  // namespace epmoe::post_reorder
