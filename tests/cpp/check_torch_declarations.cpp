// SPDX-License-Identifier: MIT
// Compiles only if torch_shim.h agrees with the official headers: two extern "C" declarations of one name with
// different types are an error.   g++ -std=c++20 -fsyntax-only -I<torch>/include tests/cpp/check_torch_declarations.cpp
#include <torch/csrc/stable/c/shim.h>
#include "../../bindings/torch/torch_shim.h"
