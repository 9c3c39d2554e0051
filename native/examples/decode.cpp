// Decodes the last tokens of a sequence out of a safetensors file, as an inference engine would: with the window's buffer, and
// compressing only what is new.
//
//     decode_cxx FILE [STEPS]
//
// FILE has "query" [HQ, D], "keys" [T, HK, D] and "values" [T, HK, DV] in one dtype: F32, F16 or BF16. Prints a checksum and the
// first bytes of each step's output.
#include <nsa/nsa.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

namespace {

struct Tensor {
    std::string dtype;
    std::vector<int> shape;
    const char *data;
    std::size_t bytes;
};

// One entry of the header, {"name":{"dtype":"F32","shape":[..],"data_offsets":[a,b]}, ..}: enough of JSON for what is asked here.
class File {
  public:
    explicit File(const char *path) {
        std::ifstream stream(path, std::ios::binary);
        content_.assign(std::istreambuf_iterator<char>(stream), {});
        std::uint64_t length = 0;
        if (content_.size() >= 8)
            std::memcpy(&length, content_.data(), 8);
        if (content_.size() < 8 || length > content_.size() - 8)
            throw std::runtime_error(std::string(path) + " is no safetensors file");
        header_ = content_.substr(8, length);
        start_ = 8 + length;
    }

    Tensor tensor(const std::string &name) const {
        const std::size_t at = header_.find('"' + name + '"');
        if (at == std::string::npos)
            throw std::runtime_error("the file has no tensor \"" + name + '"');
        const std::string entry = header_.substr(at, header_.find('}', at) - at);
        const auto offsets = numbers(entry, "data_offsets"), shape = numbers(entry, "shape");
        const std::size_t quote = entry.find('"', entry.find(':', entry.find("\"dtype\"")));
        if (offsets.size() != 2 || offsets[1] < offsets[0] || offsets[1] > content_.size() - start_)
            throw std::runtime_error("the tensor \"" + name + "\" lies outside the file");
        Tensor found{entry.substr(quote + 1, entry.find('"', quote + 1) - quote - 1), {}, content_.data() + start_ + offsets[0],
                     offsets[1] - offsets[0]};
        for (std::size_t size : shape)
            found.shape.push_back(static_cast<int>(size));
        return found;
    }

  private:
    static std::vector<std::size_t> numbers(const std::string &entry, const char *key) {
        std::vector<std::size_t> found;
        std::size_t at = entry.find(std::string("\"") + key + '"');
        if (at == std::string::npos || (at = entry.find('[', at)) == std::string::npos)
            return found;
        for (const char *text = entry.c_str() + at + 1; *text && *text != ']'; text += *text == ',' || *text == ' ') {
            char *end;
            const unsigned long long number = std::strtoull(text, &end, 10);
            if (end == text && *text != ',' && *text != ' ')
                return {};
            if (end != text)
                found.push_back(number);
            text = end;
            if (*text == ']' || !*text)
                break;
        }
        return found;
    }

    std::string content_, header_;
    std::size_t start_ = 0;
};

// GPU memory that lives as long as this does.
class Memory {
  public:
    Memory(const void *data, std::size_t bytes) : memory_(device_upload(data, bytes)) {
        if (!memory_)
            throw std::runtime_error("no GPU memory");
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() { device_free(memory_); }
    char *get() const { return static_cast<char *>(memory_); }

  private:
    void *memory_;
};

class Context {
  public:
    explicit Context(const NSAConfig &config) { check(nsa_init(&ctx_, &config)); }
    Context(const Context &) = delete;
    Context &operator=(const Context &) = delete;
    ~Context() { nsa_free(&ctx_); }
    NSAContext *get() { return &ctx_; }
    void check(int error) const {
        if (error != NSA_OK)
            throw std::runtime_error(std::string(nsa_error_name(error)) + ": " + nsa_last_error(&ctx_));
    }

  private:
    NSAContext ctx_;
};

NSAConfig config_of(const Tensor &query, const Tensor &keys, const Tensor &values) {
    if (query.shape.size() != 2 || keys.shape.size() != 3 || values.shape.size() != 3 || query.shape[1] != keys.shape[2] ||
        keys.shape[0] != values.shape[0] || keys.shape[1] != values.shape[1])
        throw std::runtime_error("query, keys and values must be [HQ, D], [T, HK, D] and [T, HK, DV]");
    NSAConfig config = nsa_create_default_config(query.shape[1], query.shape[0]);
    config.num_kv_heads = keys.shape[1];
    config.value_dim = values.shape[2];
    config.max_seq_len = keys.shape[0];
    config.incremental = 1;
    config.dtype = query.dtype == "F32" ? NSA_DTYPE_FP32 : query.dtype == "F16" ? NSA_DTYPE_FP16 : NSA_DTYPE_BF16;
    if (query.dtype != keys.dtype || keys.dtype != values.dtype || (config.dtype == NSA_DTYPE_BF16 && query.dtype != "BF16"))
        throw std::runtime_error("the tensors must have one dtype: F32, F16 or BF16");
    return config;
}

void decode(const File &file, int steps) {
    const Tensor query = file.tensor("query"), keys = file.tensor("keys"), values = file.tensor("values");
    const NSAConfig config = config_of(query, keys, values);
    const int tokens = keys.shape[0], first = steps < tokens ? tokens - steps : 0;
    const std::size_t key_row = keys.bytes / tokens, value_row = values.bytes / tokens;
    std::vector<char> result(value_row / config.num_kv_heads * config.num_heads);
    const Memory q(query.data, query.bytes), k(keys.data, keys.bytes), v(values.data, values.bytes);
    const Memory out(result.data(), result.size());
    Context ctx(config);
    ctx.check(nsa_update_window(ctx.get(), k.get(), v.get(), first, nullptr)); // the prompt
    for (int t = first; t < tokens; t++) {
        ctx.check(nsa_update_window(ctx.get(), k.get() + t * key_row, v.get() + t * value_row, 1, nullptr));
        ctx.check(nsa_compute_attention(ctx.get(), q.get(), k.get(), v.get(), t + 1, out.get(), nullptr));
        if (device_download(result.data(), out.get(), result.size()))
            throw std::runtime_error("the GPU failed");
        std::uint32_t sum = 0;
        for (unsigned char byte : result)
            sum = 31 * sum + byte;
        std::printf("token %d: checksum %08x, bytes", t, sum);
        for (std::size_t i = 0; i < 8 && i < result.size(); i++)
            std::printf(" %02x", static_cast<unsigned char>(result[i]));
        std::printf("\n");
    }
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 2 || argc > 3) {
        std::fprintf(stderr, "usage: decode_cxx FILE [STEPS]\n");
        return 2;
    }
    try {
        const File file(argv[1]);
        if (device_open())
            return 1;
        decode(file, argc > 2 ? std::atoi(argv[2]) : 4);
        device_close();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
