// SPDX-License-Identifier: MIT
// Emulated kernels run one after the other.
#pragma once

namespace natten::ptx {

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace natten::ptx
