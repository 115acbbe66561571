// SPDX-License-Identifier: MIT
// What the binding uses of torch's stable ABI (torch >= 2.10), declared here, so that building needs no torch.
// torch_shim.h has the C functions (they live in libtorch_cpu.so and are covered by torch's ABI promise); this file
// wraps them in a subset of torch/csrc/stable under torch's own names. Only binding.cpp and device.cpp include it.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>
#include "torch_shim.h"

template <class... A>
std::string torch_subset_concat(const A&... a) {
  std::ostringstream s;
  (s << ... << a);
  return s.str();
}
#define STD_TORCH_CHECK(cond, ...)                                           \
  do {                                                                       \
    if (!(cond)) throw std::runtime_error(torch_subset_concat(__VA_ARGS__)); \
  } while (0)
#define TORCH_SUBSET_CALL(call) STD_TORCH_CHECK((call) == 0, "torch: " #call " failed")

namespace torch::headeronly {
enum class ScalarType { Float, Double, BFloat16, Half, Long, Other };
inline int32_t to_shim(ScalarType t) {  // the numbers of the ABI are torch's secret: always ask
  switch (t) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    default:
      throw std::runtime_error("dtype not supported");
  }
}
}  // namespace torch::headeronly

namespace torch::stable {
using headeronly::ScalarType;

struct Device {
  int32_t type, index;
  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
};

class Tensor {  // shared ownership of one handle
  std::shared_ptr<AtenTensorOpaque> handle_;
  template <class T, class F>
  T get(F f) const {
    T x;
    TORCH_SUBSET_CALL(f(handle_.get(), &x));
    return x;
  }

 public:
  explicit Tensor(AtenTensorHandle h) : handle_(h, [](AtenTensorHandle p) { aoti_torch_delete_tensor_object(p); }) {}
  AtenTensorHandle get() const { return handle_.get(); }
  void* data_ptr() const { return get<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t size(int64_t d) const {
    int64_t n;
    TORCH_SUBSET_CALL(aoti_torch_get_size(get(), d, &n));
    return n;
  }
  std::span<const int64_t> strides() const { return {get<int64_t*>(aoti_torch_get_strides), size_t(dim())}; }
  int32_t get_device_index() const { return get<int32_t>(aoti_torch_get_device_index); }
  Device device() const { return {get<int32_t>(aoti_torch_get_device_type), get_device_index()}; }
  ScalarType scalar_type() const {
    const int32_t code = get<int32_t>(aoti_torch_get_dtype);
    for (auto t : {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double, ScalarType::Long})
      if (code == headeronly::to_shim(t)) return t;
    return ScalarType::Other;
  }
};

struct SizesRef {
  const int64_t* data;
  size_t size;
};

inline Tensor empty_strided_contiguous(SizesRef sizes, int32_t dtype, Device device) {
  std::vector<int64_t> strides(sizes.size);
  int64_t step = 1;
  for (size_t d = sizes.size; d-- > 0; step *= std::max<int64_t>(sizes.data[d], 1)) strides[d] = step;
  AtenTensorHandle out;
  TORCH_SUBSET_CALL(aoti_torch_empty_strided(int64_t(sizes.size), sizes.data, strides.data(), dtype, device.type,
                                             device.index, &out));
  return Tensor(out);
}

inline Tensor new_empty(const Tensor& like, SizesRef sizes, std::optional<ScalarType> dtype = std::nullopt) {
  int32_t code;
  if (dtype)
    code = headeronly::to_shim(*dtype);
  else
    TORCH_SUBSET_CALL(aoti_torch_get_dtype(like.get(), &code));
  return empty_strided_contiguous(sizes, code, like.device());
}

inline Tensor empty_cpu(std::vector<int64_t> sizes, ScalarType dtype) {
  return empty_strided_contiguous({sizes.data(), sizes.size()}, headeronly::to_shim(dtype),
                                  {aoti_torch_device_type_cpu(), 0});
}

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  auto body = [](int64_t b, int64_t e, void* ctx) { (*static_cast<const F*>(ctx))(b, e); };
  TORCH_SUBSET_CALL(torch_parallel_for(begin, end, grain, body, const_cast<void*>(static_cast<const void*>(&f))));
}

// --- boxing: how a C++ function becomes `void(StableIValue* stack, inputs, outputs)` ---------------------------
namespace detail {
template <class T>
struct Take {  // scalars and handles are the bits of the stack slot
  static T call(StableIValue v) {
    static_assert(std::is_trivially_copyable_v<T>);
    T x;
    std::memcpy(&x, &v, sizeof x);
    return x;
  }
};
template <>
struct Take<Tensor> {
  static Tensor call(StableIValue v) { return Tensor(Take<AtenTensorHandle>::call(v)); }
};
template <class T>
struct Take<std::optional<T>> {  // a null, or a heap-allocated slot that the callee frees
  static std::optional<T> call(StableIValue v) {
    std::unique_ptr<StableIValue> slot(Take<StableIValue*>::call(v));
    return slot ? std::optional<T>(Take<T>::call(*slot)) : std::nullopt;
  }
};
template <class T>
struct Take<std::vector<T>> {
  static std::vector<T> call(StableIValue v) {
    std::unique_ptr<StableListOpaque, int32_t (*)(StableListHandle)> list(Take<StableListHandle>::call(v),
                                                                          torch_delete_list);
    size_t size = 0;
    TORCH_SUBSET_CALL(torch_list_size(list.get(), &size));
    std::vector<T> out;
    out.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_SUBSET_CALL(torch_list_get_item(list.get(), i, &item));
      out.push_back(Take<T>::call(item));
    }
    return out;
  }
};
template <>
struct Take<std::string> {
  static std::string call(StableIValue v) {
    std::unique_ptr<StringOpaque, int32_t (*)(StringHandle)> s(Take<StringHandle>::call(v), torch_delete_string);
    size_t size = 0;
    const char* data = nullptr;
    TORCH_SUBSET_CALL(torch_string_length(s.get(), &size));
    TORCH_SUBSET_CALL(torch_string_c_str(s.get(), &data));
    return {data, size};
  }
};
template <class T>
StableIValue give(const T& x) {
  StableIValue v = 0;
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(&v, &x, sizeof x);
  return v;
}
inline StableIValue give(const Tensor& t) {
  AtenTensorHandle h;
  TORCH_SUBSET_CALL(aoti_torch_new_tensor_handle(t.get(), &h));
  return give(h);
}

template <auto fn, class R, class... A, size_t... I>
void call_boxed(StableIValue* stack, R (*)(A...), std::index_sequence<I...>) {
  std::tuple<std::decay_t<A>...> args{Take<std::decay_t<A>>::call(stack[I])...};  // braces: left to right
  R result = std::apply(fn, std::move(args));
  if constexpr (requires { std::tuple_size<R>::value; })
    [&]<size_t... J>(std::index_sequence<J...>) {
      ((stack[J] = give(std::get<J>(result))), ...);
    }(std::make_index_sequence<std::tuple_size_v<R>>());
  else
    stack[0] = give(result);
}
template <class R, class... A>
constexpr size_t arity(R (*)(A...)) {
  return sizeof...(A);
}
template <auto fn>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t) {
  STD_TORCH_CHECK(inputs == arity(fn), "schema and kernel disagree on the number of arguments");
  call_boxed<fn>(stack, fn, std::make_index_sequence<arity(fn)>());
}

constexpr uint64_t kTorch_2_10 = (2ULL << 56) | (10ULL << 48);
struct Library {
  TorchLibraryHandle lib;
  void def(const char* schema) { TORCH_SUBSET_CALL(aoti_torch_library_def(lib, schema)); }
  void impl(const char* name, void (*f)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_SUBSET_CALL(torch_library_impl(lib, name, f, kTorch_2_10));
  }
};
struct Registrar {  // runs inside dlopen: an error here ends the process (see _library.py)
  Library lib;
  Registrar(const char* ns, const char* key, const char* file, uint32_t line, void (*body)(Library&)) {
    TORCH_SUBSET_CALL(key ? aoti_torch_library_init_impl(ns, key, file, line, &lib.lib)
                          : aoti_torch_library_init_def(ns, file, line, &lib.lib));
    body(lib);
  }
  ~Registrar() { aoti_torch_delete_library_object(lib.lib); }
};
}  // namespace detail
}  // namespace torch::stable

#define TORCH_BOX(f) torch::stable::detail::boxed<f>
#define TORCH_SUBSET_STR(x) #x
#define STABLE_TORCH_LIBRARY(ns, m) TORCH_SUBSET_LIBRARY(ns, def, nullptr, m)
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) TORCH_SUBSET_LIBRARY(ns, key, #key, m)
#define TORCH_SUBSET_LIBRARY(ns, id, key, m)                                                           \
  static void torch_library_##id(torch::stable::detail::Library&);                                     \
  static const torch::stable::detail::Registrar torch_registrar_##id(TORCH_SUBSET_STR(ns), key, "", 0, \
                                                                     torch_library_##id);              \
  static void torch_library_##id(torch::stable::detail::Library& m)
