// As much of the LibTorch stable ABI as the CPU kernels call, so that they run on a CPU that has no
// PyTorch here (foreign.cpp). Memory starts as NaN in each type; each parallel_for has threads of its
// own.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace {

struct Array {
  std::shared_ptr<char> memory;
  int64_t dtype = 0;
  std::vector<int64_t> sizes, strides;

  int64_t numel() const {
    int64_t n = 1;
    for (int64_t size : sizes) n *= size;
    return n;
  }
};

enum : int32_t { BOOL, INT32, INT64, HALF, BFLOAT16, FLOAT, DOUBLE, OTHER };
constexpr int64_t WIDTH[] = {1, 4, 8, 2, 2, 4, 8};
constexpr uint32_t THREADS = 3;

Array& array(AtenTensorHandle x) { return *reinterpret_cast<Array*>(x); }
AtenTensorHandle handle(Array x) {
  return reinterpret_cast<AtenTensorHandle>(new Array(std::move(x)));
}

std::shared_ptr<char> memory(int64_t bytes) {
  char* p = static_cast<char*>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
  std::memset(p, 0xff, bytes);
  return {p, std::free};
}

Array empty(std::vector<int64_t> sizes, int64_t dtype) {
  Array x{nullptr, dtype, sizes, sizes};
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) x.strides[i] = step;
  x.memory = memory(x.numel() * WIDTH[dtype]);
  return x;
}

Array contiguous(const Array& x) {
  Array y = empty(x.sizes, x.dtype);
  const int64_t width = WIDTH[x.dtype];
  for (int64_t i = 0; i < x.numel(); ++i) {
    int64_t rest = i, from = 0;
    for (size_t d = x.sizes.size(); d-- > 0; rest /= x.sizes[d])
      from += rest % x.sizes[d] * x.strides[d];
    std::memcpy(y.memory.get() + i * width, x.memory.get() + from * width, width);
  }
  return y;
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);
std::map<std::string, Boxed>& kernels() {
  static std::map<std::string, Boxed> all;
  return all;
}

template <class T>
T get(StableIValue x) {
  T y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
template <class T>
StableIValue put(T x) {
  StableIValue y = 0;
  std::memcpy(&y, &x, sizeof x);
  return y;
}

}  // namespace

extern "C" {

#define CODE(name, value) \
  int32_t name() { return value; }
CODE(aoti_torch_dtype_bool, BOOL)
CODE(aoti_torch_dtype_int32, INT32)
CODE(aoti_torch_dtype_int64, INT64)
CODE(aoti_torch_dtype_float16, HALF)
CODE(aoti_torch_dtype_bfloat16, BFLOAT16)
CODE(aoti_torch_dtype_float32, FLOAT)
CODE(aoti_torch_dtype_float64, DOUBLE)
// What no kernel uses only has to differ from what it does.
CODE(aoti_torch_dtype_uint8, OTHER)
CODE(aoti_torch_dtype_int8, OTHER)
CODE(aoti_torch_dtype_int16, OTHER)
CODE(aoti_torch_dtype_uint16, OTHER)
CODE(aoti_torch_dtype_uint32, OTHER)
CODE(aoti_torch_dtype_uint64, OTHER)
CODE(aoti_torch_dtype_complex32, OTHER)
CODE(aoti_torch_dtype_complex64, OTHER)
CODE(aoti_torch_dtype_complex128, OTHER)
CODE(aoti_torch_dtype_float8_e5m2, OTHER)
CODE(aoti_torch_dtype_float8_e4m3fn, OTHER)
CODE(aoti_torch_dtype_float8_e5m2fnuz, OTHER)
CODE(aoti_torch_dtype_float8_e4m3fnuz, OTHER)
CODE(torch_dtype_float8_e8m0fnu, OTHER)
CODE(torch_dtype_float4_e2m1fn_x2, OTHER)
CODE(aoti_torch_device_type_cpu, 0)
CODE(aoti_torch_device_type_cuda, 1)
CODE(aoti_torch_device_type_meta, 2)
CODE(aoti_torch_device_type_xpu, 3)
CODE(aoti_torch_device_type_mps, 4)
CODE(aoti_torch_device_type_privateuse1, 5)
CODE(aoti_torch_layout_strided, 0)
CODE(aoti_torch_layout_sparse_coo, 1)
CODE(aoti_torch_layout_sparse_csr, 2)
CODE(aoti_torch_layout_sparse_csc, 3)
CODE(aoti_torch_layout_sparse_bsr, 4)
CODE(aoti_torch_layout_sparse_bsc, 5)
CODE(aoti_torch_layout__mkldnn, 6)
CODE(aoti_torch_layout_jagged, 7)
CODE(aoti_torch_memory_format_contiguous_format, 0)
CODE(aoti_torch_memory_format_preserve_format, OTHER)
CODE(aoti_torch_memory_format_channels_last, OTHER)
CODE(aoti_torch_memory_format_channels_last_3d, OTHER)

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

#define FIELD(name, type, value)                      \
  AOTITorchError name(AtenTensorHandle x, type* to) { \
    *to = value;                                      \
    return AOTI_TORCH_SUCCESS;                        \
  }
FIELD(aoti_torch_get_data_ptr, void*, array(x).memory.get())
FIELD(aoti_torch_get_device_type, int32_t, 0)
FIELD(aoti_torch_get_dim, int64_t, static_cast<int64_t>(array(x).sizes.size()))
FIELD(aoti_torch_get_dtype, int32_t, static_cast<int32_t>(array(x).dtype))
FIELD(aoti_torch_get_numel, int64_t, array(x).numel())
FIELD(aoti_torch_new_tensor_handle, AtenTensorHandle, handle(array(x)))

AOTITorchError aoti_torch_get_size(AtenTensorHandle x, int64_t d, int64_t* to) {
  const auto& sizes = array(x).sizes;
  *to = sizes.at(d < 0 ? d + sizes.size() : d);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_stride(AtenTensorHandle x, int64_t d, int64_t* to) {
  const auto& strides = array(x).strides;
  *to = strides.at(d < 0 ? d + strides.size() : d);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_new_uninitialized_tensor(AtenTensorHandle* to) {
  *to = handle({});
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle x) {
  delete &array(x);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_new_list_reserve_size(size_t size, StableListHandle* to) {
  auto* list = new std::vector<StableIValue>;
  list->reserve(size);
  *to = reinterpret_cast<StableListHandle>(list);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_list_push_back(StableListHandle list, StableIValue x) {
  reinterpret_cast<std::vector<StableIValue>*>(list)->push_back(x);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_delete_list(StableListHandle list) {
  delete reinterpret_cast<std::vector<StableIValue>*>(list);
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_get_num_threads(uint32_t* to) {
  *to = THREADS;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc f, void* ctx) {
  std::vector<std::thread> team;
  for (int64_t i = begin; i < end; ++i) team.emplace_back([=] { f(i, i + 1, ctx); });
  for (auto& thread : team) thread.join();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_call_dispatcher(const char* op, const char*, StableIValue* stack, uint64_t) {
  const std::string name(op);
  const auto self = get<AtenTensorHandle>(stack[0]);
  Array out;
  if (name == "aten::contiguous") {
    out = contiguous(array(self));
  } else if (name == "aten::transpose") {
    out = array(self);
    const auto a = get<int64_t>(stack[1]), b = get<int64_t>(stack[2]);
    std::swap(out.sizes.at(a), out.sizes.at(b));
    std::swap(out.strides.at(a), out.strides.at(b));
  } else if (name == "aten::new_empty") {
    const auto list = get<StableListHandle>(stack[1]);
    std::vector<int64_t> sizes;
    for (StableIValue x : *reinterpret_cast<std::vector<StableIValue>*>(list))
      sizes.push_back(get<int64_t>(x));
    torch_delete_list(list);
    auto* dtype = get<StableIValue*>(stack[2]);
    out = empty(sizes, dtype ? get<int32_t>(*dtype) : array(self).dtype);
    for (int i = 2; i < 6; ++i) delete get<StableIValue*>(stack[i]);
  } else {
    std::fprintf(stderr, "the kernels call %s, which this ABI lacks\n", op);
    std::abort();
  }
  delete &array(self);
  stack[0] = put(handle(std::move(out)));
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                            TorchLibraryHandle* to) {
  *to = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t,
                                                TorchLibraryHandle* to) {
  *to = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_library_def(TorchLibraryHandle, const char*) {
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError torch_library_impl(TorchLibraryHandle, const char* name, Boxed f, uint64_t) {
  kernels()[name] = f;
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
