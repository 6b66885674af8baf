// tab._host: host code without torch. Build facts; batch assembly for images.
//
//   moves     (seed, epoch, image) -> (dy, dx, mirror): the one home of the dice
//   assemble  gather -> translate -> flip -> normalise -> channels-last float32, in one pass
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// One binary for every x86-64: the loader picks the widest version the machine has.
#if defined(__x86_64__) && defined(__linux__)
#define TAB_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TAB_CLONES
#endif

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

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

void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

// moves[i] = (dy, dx, mirror) for image index[i]: dy, dx uniform in -translate…translate pixels,
// mirror 0 or 1. Each image's dice hang on its own number, not on its place in the epoch.
Array<int8_t> moves(uint64_t seed, uint64_t epoch, const Array<int64_t>& index, int translate,
                    bool flip) {
    require(0 <= translate && translate <= 127,
            "translate " + std::to_string(translate) + " is not in 0…127");
    const py::ssize_t n = index.size();
    Array<int8_t> out({n, py::ssize_t(3)});
    const int64_t* i = index.data();
    int8_t* to = out.mutable_data();
    const uint64_t key = hash(seed, epoch), span = 2 * translate + 1;
    for (py::ssize_t k = 0; k < n; ++k, to += 3) {
        const uint64_t dice = hash(key, i[k]);  // 32 + 31 + 1 bits
        to[0] = int8_t(((dice >> 32) * span >> 32)) - translate;
        to[1] = int8_t((((dice >> 1) & 0x7fffffffu) * span >> 31)) - translate;
        to[2] = flip && (dice & 1);
    }
    return out;
}

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
        for (int64_t i = 3 * from; i < 3 * to; ++i)
            out[i] = (source[i - shift] - mean[i]) * scale[i];
        std::fill(out + 3 * to, out + length, 0.0f);
    }
}

// images (N, H, W, 3) uint8, index (B,), moves (B, 3) -> out (B, H, W, 3) float32, in place.
void assemble(const Array<uint8_t>& images, const Array<int64_t>& index, const Array<int8_t>& moves,
              const Array<float>& mean, const Array<float>& scale, Array<float>& out, int threads) {
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
    float* to = out.mutable_data();
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

    py::gil_scoped_release free;
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

}  // namespace

PYBIND11_MODULE(_host, m) {
    m.doc() = "Host code of TAB: no torch in it.";
    m.attr("compiler") = __VERSION__;
    m.def("hash", &hash, py::arg("seed"), py::arg("epoch"), "A 64-bit hash of both.");
    m.def("moves", &moves, py::arg("seed"), py::arg("epoch"), py::arg("index").noconvert(),
          py::arg("translate"), py::arg("flip"), "(dy, dx, mirror) int8 (B, 3) for each image.");
    m.def("assemble", &assemble, py::arg("images").noconvert(), py::arg("index").noconvert(),
          py::arg("moves").noconvert(), py::arg("mean").noconvert(), py::arg("scale").noconvert(),
          py::arg("out").noconvert(), py::arg("threads"),
          "Gather, translate, flip and normalise images (N, H, W, 3) into out (B, H, W, 3).");
}
