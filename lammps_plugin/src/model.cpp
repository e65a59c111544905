#include "model.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <fstream>
#include <stdexcept>

#include "json.h"
#include "kernels.h"

namespace compactmlip {
namespace {

constexpr int kNewestFormat = 4;  // DEPLOYED_VERSION of compactmlip/deploy/archive.py
constexpr const char* kEntry = "extra/compactmlip.json";
constexpr const char* kTrust = "trust";  // METHOD of compactmlip/deploy/trust.py

// First line, without the place in torch's sources.
std::string reason(const std::exception& error) {
  const auto* from_torch = dynamic_cast<const c10::Error*>(&error);
  std::string text = from_torch ? from_torch->what_without_backtrace() : error.what();
  // TorchScript prints the traceback of the recorded operation first.
  const std::string mark = "RuntimeError: ";
  if (const size_t at = text.rfind(mark); at != std::string::npos) text = text.substr(at + mark.size());
  return text.substr(0, text.find('\n'));
}

Json description(const std::string& path) {
  if (!std::ifstream(path)) throw std::runtime_error("no such file, or it cannot be read");
  std::string text;
  try {
    caffe2::serialize::PyTorchStreamReader archive(path);
    if (archive.hasRecord(kEntry)) {
      const auto [data, size] = archive.getRecord(kEntry);
      text.assign(static_cast<const char*>(data.get()), size);
    }
  } catch (const std::exception&) {
    throw std::runtime_error("not a deployed file, or a damaged one; deployed files are made by 'compactmlip compile'");
  }
  if (text.empty()) throw std::runtime_error("not made by 'compactmlip compile'");
  return JsonReader(text).read();
}

// Restores the number of threads, which belongs to LAMMPS.
class Threads {
 public:
  explicit Threads(int wanted) : before_(at::get_num_threads()) {
    if (wanted > 0 && wanted != before_) at::set_num_threads(wanted);
  }
  ~Threads() {
    if (at::get_num_threads() != before_) at::set_num_threads(before_);
  }

 private:
  int before_;
};

class Exchange {
 public:
  Exchange(compactmlip_set_exchange_type set, const compactmlip_exchange* exchange) : set_(set) {
    if (set_) before_ = set_(exchange);
  }
  ~Exchange() {
    if (set_) set_(before_);
  }

 private:
  compactmlip_set_exchange_type set_;
  const compactmlip_exchange* before_ = nullptr;
};

at::Tensor view(const std::vector<int64_t>& values) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kLong);
}

void copy(const at::Tensor& from, double* to) { at::from_blob(to, from.sizes(), at::kDouble).copy_(from); }

}  // namespace

struct Model::State {
  torch::jit::Module module;
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kDouble;
  std::vector<std::string> species;
  double cutoff = 0;
  std::string precision, backend;
  bool can_be_split = false;
  int64_t message_bytes = 0;
  compactmlip_set_exchange_type set_exchange = nullptr;

  void describe(const Json& file);
  void load(const std::string& path, const std::string& where, const std::string& folder);
  void probe();
  std::vector<c10::IValue> inputs(const Graph& graph) const;
};

void Model::State::describe(const Json& file) {
  const Json& deployed = file.at("deployed");
  const int version = static_cast<int>(deployed.at("format_version").number);
  if (version > kNewestFormat)
    throw std::runtime_error("made by a newer compactmlip (format " + std::to_string(version) + ", this reads up to " +
                             std::to_string(kNewestFormat) + "); upgrade compactmlip and run 'compactmlip build'");
  const Json& units = file.at("units");
  if (units.at("energy").text != "eV" || units.at("length").text != "Angstrom")
    throw std::runtime_error("its units are not eV and Angstrom");
  for (const Json& symbol : file.at("species").items) species.push_back(symbol.text);
  cutoff = file.at("cutoff").number;
  dtype = file.at("dtype").text == "float32" ? at::kFloat : at::kDouble;
  backend = deployed.find("backend") ? deployed.at("backend").text : "torch";
  const Json* given = deployed.find("precision");
  precision = given && given->text != "null" ? given->text : file.at("dtype").text;
  can_be_split = file.at("num_message_passing_layers").number <= 1;
  if (species.empty() || !(cutoff > 0)) throw std::runtime_error("its description has no species or no cutoff");
  if (backend != "torch" && backend != "kernels")
    throw std::runtime_error("compiled with --backend " + backend +
                             ", which LAMMPS cannot run; compile it with --backend kernels");
}

void Model::State::load(const std::string& path, const std::string& where, const std::string& folder) {
  device = at::Device(where);
  if (!device.is_cpu()) {
    if (backend == "kernels")
      throw std::runtime_error("compiled with --backend kernels, which run on the CPU only; use 'device cpu', or "
                               "compile it with --backend torch");
    dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);  // if it is missing, torch says that there is no such device
  }
  if (backend == "kernels") set_exchange = load_kernels(folder);
  module = torch::jit::load(path, device);
  module.eval();
}

// Evaluates one atom with one ghost: whether they are told apart, and how much is sent.
void Model::State::probe() {
  if (!set_exchange) return;
  const auto nothing = [](void*, const compactmlip_rows*, int64_t, int64_t) {};
  const auto measure = [](void* most, const compactmlip_rows* rows, int64_t count) {
    int64_t bytes = 0;
    for (int64_t k = 0; k < count; k++) {
      bytes += rows[k].bytes;
      std::fill_n(static_cast<char*>(rows[k].data) + rows[k].bytes, rows[k].bytes, 0);
    }
    *static_cast<int64_t*>(most) = std::max(*static_cast<int64_t*>(most), bytes);
  };
  const compactmlip_exchange exchange{1, 2, &message_bytes, measure, nothing};
  const Exchange set(set_exchange, &exchange);
  const torch::jit::GraphOptimizerEnabledGuard plain(false);
  const at::NoGradGuard no_gradient;
  const auto index = at::TensorOptions().dtype(at::kLong);
  at::Tensor vector = at::zeros({1, 3}, at::TensorOptions().dtype(dtype));
  vector.fill_(0.3 * cutoff);
  const auto found = module.forward({at::zeros({2}, index), at::zeros({1}, index), at::ones({1}, index), vector});
  can_be_split |= found.toTensor().size(0) == 1;
}

std::vector<c10::IValue> Model::State::inputs(const Graph& graph) const {
  const at::Tensor vectors =
      at::from_blob(const_cast<double*>(graph.vectors.data()), {graph.edges(), 3}, at::kDouble);
  return {view(graph.species).to(device), view(graph.centers).to(device), view(graph.neighbors).to(device),
          vectors.to(device, dtype)};
}

Model::Model(const std::string& path, const std::string& device, const std::string& folder)
    : state_(std::make_unique<State>()) {
  try {
    state_->describe(description(path));
    state_->load(path, device, folder);
    state_->probe();
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + reason(error));
  }
}

Model::~Model() = default;

const std::vector<std::string>& Model::species() const { return state_->species; }
double Model::cutoff() const { return state_->cutoff; }
const std::string& Model::precision() const { return state_->precision; }
const std::string& Model::backend() const { return state_->backend; }
bool Model::can_be_split() const { return state_->can_be_split; }
int64_t Model::message_bytes() const { return state_->message_bytes; }
bool Model::has_trust_region() const { return state_->module.find_method(kTrust).has_value(); }

void Model::evaluate(const Graph& graph, const compactmlip_exchange* exchange, int threads,
                     std::vector<double>& energies, std::vector<double>& gradient) {
  State& s = *state_;
  try {
    const Threads limited(threads);
    // TorchScript's optimising executor compiles again whenever the number of edges changes.
    const torch::jit::GraphOptimizerEnabledGuard plain(false);
    const at::AutoGradMode with_gradient(true);
    const Exchange set(s.set_exchange, exchange);
    const std::vector<c10::IValue> inputs = s.inputs(graph);
    const at::Tensor vectors = inputs[3].toTensor().requires_grad_();
    const at::Tensor found = s.module.forward(inputs).toTensor().narrow(0, 0, graph.owned);
    const auto of_vectors =
        torch::autograd::grad({found.sum()}, {vectors}, {}, /*retain_graph=*/false, /*create_graph=*/false,
                              /*allow_unused=*/true)[0];
    energies.resize(graph.owned);
    copy(found.detach(), energies.data());
    gradient.resize(3 * graph.edges());
    if (of_vectors.defined()) copy(of_vectors, gradient.data());
    else std::fill(gradient.begin(), gradient.end(), 0.0);
  } catch (const std::exception& error) {
    throw std::runtime_error("the model cannot be evaluated: " + reason(error));
  }
}

void Model::scores(const Graph& graph, const compactmlip_exchange* exchange, int threads, std::vector<double>& found) {
  State& s = *state_;
  try {
    const Threads limited(threads);
    const torch::jit::GraphOptimizerEnabledGuard plain(false);
    const at::NoGradGuard no_gradient;
    const Exchange set(s.set_exchange, exchange);
    const at::Tensor scores = s.module.get_method(kTrust)(s.inputs(graph)).toTensor();
    found.resize(kReasons * graph.owned);
    copy(scores.narrow(0, 0, graph.owned), found.data());
  } catch (const std::exception& error) {
    throw std::runtime_error("the trust region cannot be evaluated: " + reason(error));
  }
}

}  // namespace compactmlip
