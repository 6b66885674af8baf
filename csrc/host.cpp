// tab._host: host code without torch. Build facts; batch assembly for images.
//
//   moves     (seed, epoch, image) -> (dy, dx, mirror): the one home of the dice
//   assemble  gather -> translate -> flip -> normalise -> channels-last float32, in one pass
//
// Bound by hand to Python's limited API (buffers are in it since 3.11), which pybind11's headers
// cannot use: so one binary serves every Python from 3.11 on. tab/data/host.py is its caller and
// holds the same arithmetic in NumPy, for where this is not built.
#undef Py_LIMITED_API  // PyTorch's build sets one without buffers
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__VERSION__)
#define COMPILER __VERSION__
#else
#define COMPILER "MSVC"
#endif

// One binary for every x86-64: the loader picks the widest version the machine has.
#if defined(__x86_64__) && defined(__linux__)
#define TAB_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TAB_CLONES
#endif

namespace {

void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

struct Raised {};  // Python holds the error

template <class T>
constexpr char CODE = 0;  // of the struct module
template <>
constexpr char CODE<uint8_t> = 'B';
template <>
constexpr char CODE<int8_t> = 'b';
template <>
constexpr char CODE<int64_t> = sizeof(long) == 8 ? 'l' : 'q';
template <>
constexpr char CODE<float> = 'f';

// A contiguous array of T, borrowed for the length of a call.
template <class T>
class Array {
 public:
  Array(PyObject* from, const char* name, bool writable = false) {
    const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(from, &view, flags) != 0) throw Raised();
    const char code = view.format && view.format[0] && !view.format[1] ? view.format[0] : 0;
    if (code == CODE<T> || (sizeof(T) == 8 && (code == 'q' || code == 'l'))) return;
    const std::string found = view.format ? view.format : "B";
    PyBuffer_Release(&view);
    PyErr_Format(PyExc_TypeError, "%s must be of type '%c' (as struct writes it), got '%s'", name,
                 CODE<T>, found.c_str());
    throw Raised();
  }
  ~Array() { PyBuffer_Release(&view); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  int64_t ndim() const { return view.ndim; }
  int64_t shape(int i) const { return view.shape[i]; }
  int64_t size() const { return view.len / int64_t(sizeof(T)); }
  T* data() const { return static_cast<T*>(view.buf); }

 private:
  Py_buffer view;
};

// SplitMix64 (Steele, Lea, Flood 2014, OOPSLA "Fast Splittable Pseudorandom Number Generators"):
// the finaliser after one step of the golden-gamma counter.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A counter-based hash: no state, so no thread count and no order of calls can change a draw.
uint64_t hash(uint64_t seed, uint64_t epoch) { return mix(mix(seed) ^ epoch); }

// to[i] = (dy, dx, mirror) for image index[i]: dy, dx uniform in -translate…translate pixels,
// mirror 0 or 1. Each image's dice hang on its own number, not on its place in the epoch.
void moves(uint64_t seed, uint64_t epoch, const Array<int64_t>& index, int translate, bool flip,
           const Array<int8_t>& out) {
  require(0 <= translate && translate <= 127,
          "translate " + std::to_string(translate) + " is not in 0…127");
  const int64_t n = index.size();
  require(out.ndim() == 2 && out.shape(0) == n && out.shape(1) == 3, "out must be (B, 3)");
  const int64_t* i = index.data();
  int8_t* to = out.data();
  const uint64_t key = hash(seed, epoch), span = 2 * translate + 1;
  for (int64_t k = 0; k < n; ++k, to += 3) {
    const uint64_t dice = hash(key, i[k]);  // 32 + 31 + 1 bits
    to[0] = int8_t(((dice >> 32) * span >> 32)) - translate;
    to[1] = int8_t((((dice >> 1) & 0x7fffffffu) * span >> 31)) - translate;
    to[2] = flip && (dice & 1);
  }
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct Picture {
  int64_t height, width;      // three channels, always
  const float *mean, *scale;  // (3·width,): the three values again and again
};

// out[y, x] = (in[y - dy, x' - dx] - mean)·scale, x' = width-1-x when mirrored: the image is moved,
// then mirrored. Uncovered pixels take the mean colour, 0. Subtract, then multiply: no fused
// multiply-add can come of it, so every machine and the torch version give the same bits.
TAB_CLONES void one_image(const uint8_t* in, float* out, const int8_t* move, const Picture& p,
                          uint8_t* row) {
  const int dy = move[0], dx = move[1];
  const bool mirror = move[2];
  const float *mean = p.mean, *scale = p.scale;
  const int64_t w = p.width, length = 3 * w;
  const int64_t from = std::max(0, mirror ? -dx : dx), to = w - std::max(0, mirror ? dx : -dx);
  for (int64_t y = 0; y < p.height; ++y, out += length) {
    const int64_t sy = y - dy;
    if (sy < 0 || sy >= p.height) {
      std::fill_n(out, length, 0.0f);
      continue;
    }
    const uint8_t* source = in + sy * length;
    int64_t shift = 3 * dx;  // out[i] comes from source[i - shift]
    if (mirror) {
      for (int64_t x = from; x < to; ++x)
        for (int c = 0; c < 3; ++c) row[3 * x + c] = source[3 * (w - 1 - x - dx) + c];
      source = row, shift = 0;
    }
    std::fill(out, out + 3 * from, 0.0f);
    // mean and scale are as long as the row, so that this is one plain vector loop.
    for (int64_t i = 3 * from; i < 3 * to; ++i) out[i] = (source[i - shift] - mean[i]) * scale[i];
    std::fill(out + 3 * to, out + length, 0.0f);
  }
}

// images (N, H, W, 3) uint8, index (B,), moves (B, 3) -> out (B, H, W, 3) float32, in place.
void assemble(const Array<uint8_t>& images, const Array<int64_t>& index, const Array<int8_t>& moves,
              const Array<float>& mean, const Array<float>& scale, const Array<float>& out,
              int threads) {
  require(images.ndim() == 4 && images.shape(3) == 3, "images must be (N, H, W, 3)");
  const int64_t count = images.shape(0), h = images.shape(1), w = images.shape(2);
  const int64_t batch = index.size();
  require(out.ndim() == 4 && out.shape(0) == batch && out.shape(1) == h && out.shape(2) == w &&
              out.shape(3) == 3,
          "out must be (B, H, W, 3) with the B of index and the H, W of images");
  require(moves.ndim() == 2 && moves.shape(0) == batch && moves.shape(1) == 3,
          "moves must be (B, 3)");
  require(mean.size() == 3 && scale.size() == 3, "mean and scale must be (3,)");
  require(threads >= 1, "threads " + std::to_string(threads) + " is not 1 or more");
  const uint8_t* from = images.data();
  const int64_t* i = index.data();
  const int8_t* move = moves.data();
  float* to = out.data();
  for (int64_t k = 0; k < batch; ++k) {
    if (i[k] < 0 || i[k] >= count)
      throw std::invalid_argument("index " + std::to_string(i[k]) + " is not in 0…" +
                                  std::to_string(count - 1));
    if (std::abs(move[3 * k]) >= h || std::abs(move[3 * k + 1]) >= w)
      throw std::invalid_argument("a move is as large as the image");
  }
  // mean and scale along a row of pixels, as one_image wants them.
  std::vector<float> means(3 * w), scales(3 * w);
  for (int64_t j = 0; j < 3 * w; ++j) {
    means[j] = mean.data()[j % 3];
    scales[j] = scale.data()[j % 3];
  }
  const Picture p{h, w, means.data(), scales.data()};

  const WithoutGil free;
  // Threads take CHUNK images at a time, so that one which the system has set aside holds up
  // little. To start a thread costs as much as some 20 images: it must find two chunks.
  constexpr int64_t CHUNK = 32;
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    std::vector<uint8_t> row(3 * w);
    for (int64_t k; (k = next.fetch_add(CHUNK)) < batch;)
      for (const int64_t end = std::min(batch, k + CHUNK); k < end; ++k)
        one_image(from + i[k] * 3 * h * w, to + k * 3 * h * w, move + 3 * k, p, row.data());
  };
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < std::min<int64_t>(threads, batch / (2 * CHUNK)); ++t)
    pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

// A call from Python: errors of C++ become Python's.
template <class Body>
PyObject* call(Body body) {
  try {
    return body();
  } catch (const Raised&) {
  } catch (const std::bad_alloc&) { PyErr_NoMemory(); } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

PyObject* done() {
  Py_INCREF(Py_None);
  return Py_None;
}

uint64_t number(PyObject* given) {
  const uint64_t value = PyLong_AsUnsignedLongLong(given);
  if (PyErr_Occurred()) throw Raised();
  return value;
}

PyObject* py_hash(PyObject*, PyObject* args) {
  return call([&]() -> PyObject* {
    PyObject *seed, *epoch;
    if (!PyArg_ParseTuple(args, "OO", &seed, &epoch)) throw Raised();
    return PyLong_FromUnsignedLongLong(hash(number(seed), number(epoch)));
  });
}

PyObject* py_moves(PyObject*, PyObject* args) {
  return call([&]() -> PyObject* {
    PyObject *seed, *epoch, *index, *out;
    int translate, flip;
    if (!PyArg_ParseTuple(args, "OOOipO", &seed, &epoch, &index, &translate, &flip, &out))
      throw Raised();
    moves(number(seed), number(epoch), Array<int64_t>(index, "index"), translate, flip,
          Array<int8_t>(out, "out", true));
    return done();
  });
}

PyObject* py_assemble(PyObject*, PyObject* args) {
  return call([&]() -> PyObject* {
    PyObject *images, *index, *moves, *mean, *scale, *out;
    int threads;
    if (!PyArg_ParseTuple(args, "OOOOOOi", &images, &index, &moves, &mean, &scale, &out, &threads))
      throw Raised();
    assemble(Array<uint8_t>(images, "images"), Array<int64_t>(index, "index"),
             Array<int8_t>(moves, "moves"), Array<float>(mean, "mean"),
             Array<float>(scale, "scale"), Array<float>(out, "out", true), threads);
    return done();
  });
}

PyMethodDef METHODS[] = {
    {"hash", py_hash, METH_VARARGS, "hash(seed, epoch): a 64-bit hash of both."},
    {"moves", py_moves, METH_VARARGS,
     "moves(seed, epoch, index, translate, flip, out): (dy, dx, mirror) of each image into out, "
     "int8 (B, 3)."},
    {"assemble", py_assemble, METH_VARARGS,
     "assemble(images, index, moves, mean, scale, out, threads): gathers, translates, flips and "
     "normalises images (N, H, W, 3) into out (B, H, W, 3)."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT,
                      "_host",
                      "Host code of TAB: no torch in it.",
                      -1,
                      METHODS,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() {
  PyObject* module = PyModule_Create(&MODULE);
  if (module && PyModule_AddStringConstant(module, "compiler", COMPILER) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
