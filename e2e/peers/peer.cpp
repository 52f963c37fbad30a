// llama.cpp's side of the comparisons, as a program of its own: its server gives out neither all logits nor many
// tokenizations at once.
//   peer logits MODEL TOKENS [OUT]   TOKENS: a sequence of ids on each line; OUT: every position's logits, 32-bit floats
//   peer tokenize MODEL TEXTS OUT [--special]   TEXTS: length (32 bits) and bytes of each; OUT: count and ids of each, 32
//   bits; --special: text may become a special token
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const std::string & what) {
    fprintf(stderr, "peer: %s\n", what.c_str());
    exit(1);
}

llama_model * load(const char * path, bool vocabulary_only) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = vocabulary_only;
    llama_model * model = llama_model_load_from_file(path, params);
    if (model == nullptr) {
        fail(std::string("cannot load ") + path);
    }
    return model;
}

int logits(const char * path, const char * tokens, const char * out_path) {
    std::vector<std::vector<llama_token>> sequences;
    size_t longest = 1;
    std::ifstream lines(tokens);
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::vector<llama_token> ids;
        for (llama_token id; words >> id;) {
            ids.push_back(id);
        }
        longest = std::max(longest, ids.size());
        sequences.push_back(ids);
    }
    llama_model * model = load(path, false);
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = longest;
    params.n_batch = params.n_ubatch = longest;
    params.n_threads = params.n_threads_batch = std::thread::hardware_concurrency();
    llama_context * context = llama_init_from_model(model, params);
    if (context == nullptr) {
        fail("cannot make a context");
    }
    FILE * out = out_path == nullptr ? nullptr : fopen(out_path, "wb");
    double nll = 0;
    size_t count = 0;
    llama_batch batch = llama_batch_init(longest, 0, 1);
    for (const auto & ids : sequences) {
        llama_memory_clear(llama_get_memory(context), true);
        batch.n_tokens = ids.size();
        for (size_t i = 0; i < ids.size(); i++) {
            batch.token[i] = ids[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(context, batch) != 0) {
            fail("cannot decode");
        }
        for (size_t i = 0; i < ids.size(); i++) {
            const float * row = llama_get_logits_ith(context, i);
            if (i + 1 < ids.size()) {
                float most = row[0];
                for (int j = 1; j < vocabulary; j++) {
                    most = std::max(most, row[j]);
                }
                double sum = 0;
                for (int j = 0; j < vocabulary; j++) {
                    sum += std::exp(double(row[j]) - most);
                }
                nll += most + std::log(sum) - row[ids[i + 1]];
                count++;
            }
            if (out != nullptr && fwrite(row, sizeof(float), vocabulary, out) != size_t(vocabulary)) {
                fail("cannot write");
            }
        }
    }
    if (out != nullptr && fclose(out) != 0) {
        fail("cannot write");
    }
    printf("{\"perplexity\":%.5f,\"scored\":%zu}\n", std::exp(nll / count), count);
    return 0;
}

int tokenize(const char * path, const char * texts, const char * out_path, bool special) {
    const llama_vocab * vocabulary = llama_model_get_vocab(load(path, true));
    std::ifstream in(texts, std::ios::binary);
    std::ofstream out(out_path, std::ios::binary);
    std::vector<llama_token> ids;
    std::string text;
    for (uint32_t length; in.read(reinterpret_cast<char *>(&length), sizeof length);) {
        text.resize(length);
        in.read(text.data(), length);
        ids.resize(length + 8);
        const int32_t count = llama_tokenize(vocabulary, text.data(), length, ids.data(), ids.size(), false, special);
        if (count < 0) {
            fail("a text has more tokens than bytes");
        }
        out.write(reinterpret_cast<const char *>(&count), sizeof count);
        out.write(reinterpret_cast<const char *>(ids.data()), count * sizeof(llama_token));
    }
    return out.flush() ? 0 : 1;
}

}  // namespace

int main(int argc, char ** argv) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    const std::string mode = argc > 1 ? argv[1] : "";
    if (mode == "logits" && (argc == 4 || argc == 5)) {
        return logits(argv[2], argv[3], argc == 5 ? argv[4] : nullptr);
    }
    if (mode == "tokenize" && (argc == 5 || argc == 6)) {
        return tokenize(argv[2], argv[3], argv[4], argc == 6);
    }
    fail("logits MODEL TOKENS [OUT], or tokenize MODEL TEXTS OUT [--special]");
}
