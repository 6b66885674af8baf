// A server for calls of the CPU kernels, linked with them and with stable_abi.h in PyTorch's place: so
// they run under an emulator of another CPU (foreign.py).
//
// Standard input holds calls, standard output the answers, in the byte order of both sides:
//   call     length and letters of the op's name, number of arguments, and these, a letter each:
//            n (None), i (int64), b (int64), f (double), t (tensor), o (tensor of an optional)
//   answer   number of tensors, and these; or -1, length and letters of the error
//   tensor   dtype, number of dimensions, sizes, strides in elements, number of bytes, bytes
// Numbers are int64.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "stable_abi.h"

namespace {

void read(void* to, int64_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != static_cast<size_t>(bytes)) std::exit(0);
}
int64_t number() {
  int64_t x;
  read(&x, sizeof x);
  return x;
}
void write(const void* from, int64_t bytes) { std::fwrite(from, 1, bytes, stdout); }
void write(int64_t x) { write(&x, sizeof x); }

Array read_array() {
  Array x;
  x.dtype = number();
  x.sizes.resize(number());
  x.strides.resize(x.sizes.size());
  for (int64_t& size : x.sizes) size = number();
  for (int64_t& stride : x.strides) stride = number();
  const int64_t bytes = number();
  x.memory = memory(bytes);
  read(x.memory.get(), bytes);
  return x;
}
void write_array(const Array& given) {
  const Array x = contiguous(given);
  write(x.dtype), write(x.sizes.size());
  for (int64_t size : x.sizes) write(size);
  for (int64_t stride : x.strides) write(stride);
  write(x.numel() * WIDTH[x.dtype]);
  write(x.memory.get(), x.numel() * WIDTH[x.dtype]);
}

StableIValue read_argument() {
  char kind;
  read(&kind, 1);
  switch (kind) {
    case 'n': return 0;
    case 'i': return put(number());
    case 'b': return put(number() != 0);
    case 'f': {
      double x;
      read(&x, sizeof x);
      return put(x);
    }
    case 't': return put(handle(read_array()));
    case 'o': return put(new StableIValue(put(handle(read_array()))));
  }
  throw std::runtime_error(std::string("an argument of kind ") + kind);
}

void answer(const std::string& name, std::vector<StableIValue> stack, uint64_t arguments,
            uint64_t outputs) {
  try {
    kernels().at(name)(stack.data(), arguments, outputs);
  } catch (const std::exception& error) {
    const std::string said = error.what();
    write(-1), write(said.size()), write(said.data(), said.size());
    return;
  }
  write(outputs);
  for (uint64_t i = 0; i < outputs; ++i) {
    const auto x = get<AtenTensorHandle>(stack[i]);
    write_array(array(x));
    delete &array(x);
  }
}

}  // namespace

int main(int count, char**) {
  if (count > 1) {  // what there is
    for (const auto& [name, f] : kernels()) std::puts(name.c_str());
    return 0;
  }
  while (true) {
    std::string name(number(), ' ');
    read(name.data(), name.size());
    const int64_t outputs = number(), arguments = number();
    std::vector<StableIValue> stack;
    for (int64_t i = 0; i < arguments; ++i) stack.push_back(read_argument());
    stack.resize(std::max(arguments, outputs));
    answer(name, stack, arguments, outputs);
    std::fflush(stdout);
  }
}
