// SPDX-License-Identifier: MIT
#include "cpu/isa.h"
#include <array>
namespace natten::cpu {
std::span<const Isa> isas() { static constexpr std::array<Isa,1> a{Isa::portable}; return a; }
}
