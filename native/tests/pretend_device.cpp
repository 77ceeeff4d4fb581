#include "pretend_device.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"

#include <cstring>
#include <deque>
#include <functional>
#include <random>

namespace test {

namespace {

struct Event {
    int recorded = 0;
    int reached  = 0;
};

struct Task {
    std::function<bool()> may_run;
    std::function<void()> run;
};

struct Queue {
    std::deque<Task> tasks;
    ggml_backend_ptr cpu{ ggml_backend_cpu_init() };
    size_t           place; // in bytes
};

std::mt19937         engine;
std::vector<Queue *> queues;
std::vector<size_t>  bytes;

Queue & queue_of(ggml_backend_t backend) {
    return *static_cast<Queue *>(backend->context);
}

Event & event_of(ggml_backend_event_t event) {
    return *static_cast<Event *>(event->context);
}

// Run the first task of any queue that may go on.
void run_one() {
    std::vector<Queue *> ready;
    for (Queue * queue : queues) {
        if (!queue->tasks.empty() && queue->tasks.front().may_run()) {
            ready.push_back(queue);
        }
    }
    if (!ready.empty()) {
        Queue &    queue = *ready[engine() % ready.size()];
        const Task task  = std::move(queue.tasks.front());
        queue.tasks.pop_front();
        task.run();
    }
}

void enqueue(ggml_backend_t backend, std::function<void()> run, std::function<bool()> may_run = [] { return true; }) {
    queue_of(backend).tasks.push_back({ std::move(may_run), std::move(run) });
    for (unsigned n = engine() % 3; n > 0; --n) {
        run_one();
    }
}

const char * name_of_backend(ggml_backend_t) {
    return "Pretend";
}

void free_backend(ggml_backend_t backend) {
    for (auto it = queues.begin(); it != queues.end(); ++it) {
        if (*it == backend->context) {
            queues.erase(it);
            break;
        }
    }
    delete &queue_of(backend);
    delete backend;
}

void set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    void * to = static_cast<char *>(tensor->data) + offset;
    bytes[queue_of(backend).place] += size;
    enqueue(backend, [=] { std::memcpy(to, data, size); });
}

bool copy_async(ggml_backend_t from, ggml_backend_t backend, const ggml_tensor * src, ggml_tensor * dst) {
    if (from != backend) {
        return false;
    }
    enqueue(backend, [to = dst->data, data = src->data, size = ggml_nbytes(dst)] { std::memcpy(to, data, size); });
    return true;
}

void synchronize(ggml_backend_t backend) {
    while (!queue_of(backend).tasks.empty()) {
        run_one();
    }
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    enqueue(backend, [&queue = queue_of(backend), graph] { ggml_backend_graph_compute(queue.cpu.get(), graph); });
    return GGML_STATUS_SUCCESS;
}

void record(ggml_backend_t backend, ggml_backend_event_t event) {
    const int n = ++event_of(event).recorded;
    enqueue(backend, [event, n] { event_of(event).reached = n; });
}

void wait(ggml_backend_t backend, ggml_backend_event_t event) {
    const int n = event_of(event).recorded;
    enqueue(backend, [] {}, [event, n] { return event_of(event).reached >= n; });
}

const char * name_of_device(ggml_backend_dev_t) {
    return "Pretend0";
}

void memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *free = *total = size_t(1) << 30;
}

enum ggml_backend_dev_type type_of_device(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

void props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    *props      = {};
    props->name = props->description = name_of_device(device);
    props->type                      = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->caps                      = { /*.async =*/true, false, false, /*.events =*/true, false };
    memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_t init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid  = { 'p', 'r', 'e', 't', 'e', 'n', 'd' };
    auto *           queue = new Queue;
    queue->place           = bytes.size();
    bytes.push_back(0);
    queues.push_back(queue);
    ggml_backend_i iface   = {};
    iface.get_name         = name_of_backend;
    iface.free             = free_backend;
    iface.set_tensor_async = set_async;
    iface.cpy_tensor_async = copy_async;
    iface.synchronize      = synchronize;
    iface.graph_compute    = compute;
    iface.event_record     = record;
    iface.event_wait       = wait;
    return new ggml_backend{ &guid, iface, device, queue };
}

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    buffer->buft                 = type;
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) {
    return 64;
}

const char * name_of_type(ggml_backend_buffer_type_t) {
    return "Pretend";
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) {
    static ggml_backend_buffer_type type = [device] {
        ggml_backend_buffer_type of = {};
        of.iface.get_name           = name_of_type;
        of.iface.alloc_buffer       = allocate;
        of.iface.get_alignment      = alignment;
        of.device                   = device;
        return of;
    }();
    return &type;
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor *) {
    return true;
}

bool supports_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == buffer_type(device);
}

bool takes(ggml_backend_dev_t, const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT && op->ne[1] >= 32;
}

ggml_backend_event_t make_event(ggml_backend_dev_t device) {
    return new ggml_backend_event{ device, new Event };
}

void free_event(ggml_backend_dev_t, ggml_backend_event_t event) {
    delete &event_of(event);
    delete event;
}

} // namespace

ggml_backend_dev_t pretend_device() {
    static ggml_backend_device device = [] {
        ggml_backend_device of   = {};
        of.iface.get_name        = name_of_device;
        of.iface.get_description = name_of_device;
        of.iface.get_memory      = memory;
        of.iface.get_type        = type_of_device;
        of.iface.get_props       = props;
        of.iface.init_backend    = init;
        of.iface.get_buffer_type = buffer_type;
        of.iface.supports_op     = supports_op;
        of.iface.supports_buft   = supports_type;
        of.iface.offload_op      = takes;
        of.iface.event_new       = make_event;
        of.iface.event_free      = free_event;
        return of;
    }();
    return &device;
}

void pretend_begin(unsigned seed) {
    engine.seed(seed);
    bytes.clear();
}

const std::vector<size_t> & pretend_bytes() {
    return bytes;
}

} // namespace test
