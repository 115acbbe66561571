// SPDX-License-Identifier: MIT
// Nothing here throws: a machine without a GPU or without a driver is a normal place to be.
#include "cuda/device.h"

#include <array>
#include <mutex>
#include <optional>

namespace natten::cuda {
namespace {

std::optional<DeviceInfo> ask(int device) {
  DeviceInfo info{};
  const std::pair<cudaDeviceAttr, int*> questions[] = {
      {cudaDevAttrComputeCapabilityMajor, &info.major},
      {cudaDevAttrComputeCapabilityMinor, &info.minor},
      {cudaDevAttrMultiProcessorCount, &info.num_sms},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &info.max_shared_bytes},
  };
  for (auto [attribute, answer] : questions)
    if (cudaDeviceGetAttribute(answer, attribute, device) != cudaSuccess) return std::nullopt;
  return info;
}

}  // namespace

const DeviceInfo* current_device() {
  constexpr int kMostDevices = 64;
  static std::array<std::once_flag, kMostDevices> asked;
  static std::array<std::optional<DeviceInfo>, kMostDevices> infos;
  int device = -1;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kMostDevices) {
    cudaGetLastError();  // forgets it: the next launch must not report this
    return nullptr;
  }
  std::call_once(asked[device], [&] { infos[device] = ask(device); });
  return infos[device] ? &*infos[device] : nullptr;
}

}  // namespace natten::cuda
