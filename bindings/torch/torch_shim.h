// SPDX-License-Identifier: MIT
// The C functions of torch's stable ABI that torch_stable.h calls, as of torch 2.10. Same names, same prototypes
// (checked by tests/cpp/check_torch_declarations.cpp); every one returns 0 on success unless it returns a code.
#pragma once
#include <cstddef>
#include <cstdint>
extern "C" {
using StableIValue = uint64_t;
struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
struct DeviceGuardOpaque;
using DeviceGuardHandle = DeviceGuardOpaque*;
struct TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
struct StringOpaque;
using StringHandle = StringOpaque*;

int32_t aoti_torch_library_init_def(const char* ns, const char* file, uint32_t line, TorchLibraryHandle* ret);
int32_t aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                     TorchLibraryHandle* ret);
int32_t aoti_torch_library_def(TorchLibraryHandle, const char* schema);
int32_t torch_library_impl(TorchLibraryHandle, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t),
                           uint64_t build_version);
int32_t aoti_torch_delete_library_object(TorchLibraryHandle);

int32_t aoti_torch_new_tensor_handle(AtenTensorHandle, AtenTensorHandle* ret);
int32_t aoti_torch_delete_tensor_object(AtenTensorHandle);
int32_t aoti_torch_get_data_ptr(AtenTensorHandle, void** ret);
int32_t aoti_torch_get_dim(AtenTensorHandle, int64_t* ret);
int32_t aoti_torch_get_size(AtenTensorHandle, int64_t dim, int64_t* ret);
int32_t aoti_torch_get_strides(AtenTensorHandle, int64_t** ret);
int32_t aoti_torch_get_dtype(AtenTensorHandle, int32_t* ret);
int32_t aoti_torch_get_device_type(AtenTensorHandle, int32_t* ret);
int32_t aoti_torch_get_device_index(AtenTensorHandle, int32_t* ret);
int32_t aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorHandle* ret);
int32_t aoti_torch_copy_(AtenTensorHandle to, AtenTensorHandle from, int32_t non_blocking);
int32_t aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle* ret);
int32_t aoti_torch_delete_device_guard(DeviceGuardHandle);
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_uint8();

int32_t torch_list_size(StableListHandle, size_t* size);
int32_t torch_list_get_item(StableListHandle, size_t index, StableIValue* item);
int32_t torch_delete_list(StableListHandle);
int32_t torch_string_length(StringHandle, size_t* length);
int32_t torch_string_c_str(StringHandle, const char** data);
int32_t torch_delete_string(StringHandle);

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*fn)(int64_t, int64_t, void*), void* ctx);
int32_t torch_get_num_threads(uint32_t* ret);
}
