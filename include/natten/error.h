// SPDX-License-Identifier: MIT
// How this library reports a problem: it throws `Error`, whose kind says who can mend it. Nothing prints or exits.
#pragma once
#include <stdexcept>
#include <string>

namespace natten {

enum class ErrorKind {
  invalid_argument,  ///< the caller's mistake; the message names the axis, the numbers and the remedy
  unsupported,       ///< a legal request that no engine here can serve
  cuda,              ///< a CUDA call failed
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace natten
