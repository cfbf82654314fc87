// What the addon keeps for one Node environment (the main thread, or a worker).
#pragma once

#include <napi.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "epmoe.h"

namespace epmoe::node {

constexpr int kMaxValues = 24;

// One call's arguments, written by JavaScript into shared memory: cheaper than passing them one by one.
struct Frame {
  double word[kMaxValues + 1];   // handle, object address, number; the last one is the stream
  int32_t kind[kMaxValues + 1];  // FrameKind; the last one is 0, or 1 + the device of the stream
  int32_t op;                    // index in the op table
};
enum FrameKind { kNone = 0, kHandle, kObject, kInteger, kReal };

class Environment;

// A CUDA stream; the default one has the same address on every device.
struct StreamRef {
  int32_t device_id = -1;  // -1: none
  void *address = nullptr;

  bool known() const { return device_id >= 0; }
  bool operator==(const StreamRef &other) const { return device_id == other.device_id && address == other.address; }
};

// Memory that one or more tensors view. Freed when the last tensor, ArrayBuffer and exported capsule let go.
class Storage {
 public:
  enum class Owner { kLibrary, kManaged, kManagedVersioned, kBuffer };

  static std::shared_ptr<Storage> allocate(Environment &environment, DLDevice device, size_t nbytes);
  static std::shared_ptr<Storage> adopt(Environment &environment, DLManagedTensor *tensor);
  static std::shared_ptr<Storage> adopt(Environment &environment, DLManagedTensorVersioned *tensor);
  static std::shared_ptr<Storage> borrow(Environment &environment, Napi::ArrayBuffer buffer);
  ~Storage();
  // Has V8 know of the memory, so that it collects tensors before memory runs out; taken back at the end.
  void report(size_t bytes);
  Storage(const Storage &) = delete;
  Storage &operator=(const Storage &) = delete;

  Owner owner;
  DLDevice device{kDLCPU, 0};
  char *data = nullptr;
  size_t nbytes = 0;
  bool read_only = false;
  napi_ref buffer = nullptr;  // kBuffer: the JavaScript owner
  // The stream of the last work on this memory, by whichever tensor. Work on another stream waits for it first, so that
  // a tensor and its views may wander between epmoe's streams and the framework's without anybody having to think of
  // it.
  StreamRef stream;

 private:
  Storage(Environment &environment, Owner owner);
  std::shared_ptr<struct Outbox> outbox_;
  void *managed_ = nullptr;
  int64_t reported_ = 0;
};

// Work that only the JavaScript thread may do, left there by whichever thread freed a storage.
struct Outbox {
  std::mutex mutex;
  std::vector<napi_ref> references;
  int64_t external_bytes = 0;
  bool closed = false;  // the environment is gone, and its references with it
};

struct TensorRecord {
  std::shared_ptr<Storage> storage;
  std::vector<int64_t> shape, strides;
  DLTensor dl{};
  bool foreign = false;       // memory of the framework behind the exchange table
  napi_ref buffer = nullptr;  // weak: the ArrayBuffer handed out over this tensor
  double handle = 0;
};

// A CUDA event, which lives as long as JavaScript and every thread that waits for it.
struct Event {
  Event(Environment &environment, int32_t device_id, bool timed);
  ~Event();
  Event(const Event &) = delete;
  Event &operator=(const Event &) = delete;

  const int32_t device_id;
  void *event = nullptr;
};

// The tensors that the work of a graph uses: their memory, which the graph keeps, and their handles, by which replays
// are ordered with other work on them for as long as the tensors live.
struct Recording {
  StreamRef stream;      // the captured one
  bool foreign = false;  // some memory is the framework's
  std::map<const Storage *, std::shared_ptr<Storage>> storages;
  std::set<double> handles;

  void keep(std::shared_ptr<Storage> storage) { storages.emplace(storage.get(), std::move(storage)); }
};

class Environment {
 public:
  explicit Environment(Napi::Env env);
  ~Environment();
  static Environment &of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  // Handles carry a generation, so that one kept after its tensor was disposed never reaches another tensor.
  double insert(std::unique_ptr<TensorRecord> record);
  TensorRecord *find(double handle);
  // `detach`: typed arrays over the tensor become empty. Otherwise they keep its memory, as when the tensor was
  // collected.
  bool erase(double handle, bool detach);

  // `stream` waits for earlier work on the tensor, and becomes the stream of its latest work. CUDA tensors only. While
  // a graph is captured the tensor is noted instead, for the replays to do this.
  void follow(TensorRecord &record, StreamRef stream);
  // `stream` waits for what `awaited` holds now.
  void wait(StreamRef stream, StreamRef awaited);
  // The stream that work on this tensor belongs to when nobody says otherwise.
  StreamRef home_stream(const TensorRecord &record);
  // The framework's current stream of a device, or epmoe's own.
  StreamRef foreign_stream(int32_t device_id);
  StreamRef own_stream(int32_t device_id);
  // Called before a stream is destroyed: waits for it, and forgets it in every tensor.
  void forget_stream(StreamRef stream);

  // Calls that were prepared, by number; a number is not used again.
  struct Prepared {
    std::unique_ptr<epmoe_prepared, decltype(&epmoe_prepared_free)> call{nullptr, epmoe_prepared_free};
    std::vector<double> handles;  // of its tensors
    int32_t gpu = -1;
    bool foreign = false;
  };
  std::map<double, Prepared> prepared;
  double last_prepared = 0;

  // Graphs, likewise; and what the one being captured uses.
  struct Graph {
    std::unique_ptr<epmoe_graph, decltype(&epmoe_graph_free)> graph{nullptr, epmoe_graph_free};
    Recording used;
  };
  std::map<double, Graph> graphs;
  double last_graph = 0;
  Recording *recording = nullptr;

  std::map<double, std::shared_ptr<Event>> events;
  double last_event = 0;

  void drain();
  // Tells V8 of what tensors hold, and of so many bytes more.
  void tell_external(int64_t bytes);
  [[noreturn]] void raise(const char *argument = nullptr);  // throws the library's last error as an EpmoeError
  [[noreturn]] void raise(const char *code, const std::string &op, const std::string &argument,
                          const std::string &expected, const std::string &received, const std::string &hint);
  Napi::Object make_error(const epmoe_error &error);
  Napi::Object make_error(const char *code, const std::string &op, const std::string &argument,
                          const std::string &expected, const std::string &received, const std::string &hint);
  void require(epmoe_status status) {
    if (status != EPMOE_OK) raise();
  }

  struct Count {
    int64_t tensors = 0, bytes = 0;
  };
  // By device, page-locked memory with the CPU's.
  std::map<std::pair<int32_t, int32_t>, Count> live() const;

  Napi::Env env;
  Napi::FunctionReference error_maker;
  Napi::Reference<Napi::ArrayBuffer> frame_buffer;
  Frame *frame = nullptr;
  std::shared_ptr<Outbox> outbox = std::make_shared<Outbox>();

 private:
  struct Slot {
    uint32_t generation = 1;
    std::unique_ptr<TensorRecord> record;
  };
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
};

void export_tensors(Napi::Env env, Napi::Object exports);
void export_calls(Napi::Env env, Napi::Object exports);
void export_graphs(Napi::Env env, Napi::Object exports);
void export_streams(Napi::Env env, Napi::Object exports);
void export_python(Napi::Env env, Napi::Object exports);
void export_parity(Napi::Env env, Napi::Object exports);
void export_bell(Napi::Env env, Napi::Object exports);
void export_crossing(Napi::Env env, Napi::Object exports);

}  // namespace epmoe::node
