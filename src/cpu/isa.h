// SPDX-License-Identifier: MIT
// Which instruction sets the kernels were compiled for, and which of them this processor has.
#pragma once
#include <span>
#include <string_view>

namespace natten::cpu {

struct Kernels;

enum class Isa { avx512, avx2, portable };

constexpr std::string_view name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

/// Those that this build holds and this processor has, best first; `portable` is always the last.
std::span<const Isa> isas();

const Kernels& kernels(Isa isa);

}  // namespace natten::cpu
