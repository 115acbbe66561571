// SPDX-License-Identifier: MIT
// What the engines ask of the current device. Host code without CUDA headers may include this file.
#pragma once

namespace natten::cuda {

struct DeviceInfo {
  int major, minor;      ///< compute capability
  int num_sms;           ///< multiprocessors
  int max_shared_bytes;  ///< shared memory that one block can have, if its kernel opts in
};

/// The current device of this thread; null when there is none that this process can use. Asked of each device once.
const DeviceInfo* current_device();

}  // namespace natten::cuda
