// The endpoint as Python sees it: `service.frontend._native`. The interface is described in _native.pyi.
//
// Lock order: the interpreter's lock is never taken while the endpoint's is held; the endpoint's may be taken while the
// interpreter's is held, since whoever holds it never waits for the interpreter.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <exception>

#include "endpoint.h"

using namespace onclock;

namespace {

struct EndpointObject {
  PyObject_HEAD
  Endpoint *endpoint;
  PyObject *explain;       // error -> (status, details, pushback)
  std::atomic<long> held;  // answers wait for a flush
};

struct CallObject {
  PyObject_HEAD
  CallPtr call;
  EndpointObject *endpoint;
  PyObject *on_cancel;
};

PyTypeObject *call_type;

template <typename Act>
void without_interpreter(Act act) {
  PyThreadState *state = PyEval_SaveThread();
  act();
  PyEval_RestoreThread(state);
}

// --------------------------------------------------------------------------------------------------------------- calls

// Takes the call for an answer; false when it has been taken. The reference that the call had to its object is dropped.
bool take(CallObject *self) {
  if (self->call->taken.exchange(true)) return false;
  if (void *owner = std::exchange(self->call->owner, nullptr)) Py_DECREF(static_cast<PyObject *>(owner));
  Py_CLEAR(self->on_cancel);  // it refers back to the call
  return true;
}

void send(CallObject *self, std::shared_ptr<Answer> answer) {
  Endpoint &endpoint = *self->endpoint->endpoint;
  endpoint.answer(self->call, std::move(answer));
  // The poller sends what was answered on its thread when it polls next; who holds answers back sends them itself.
  if (!endpoint.polled_by_me() && self->endpoint->held.load() == 0) without_interpreter([&] { endpoint.flush(); });
}

PyObject *call_reply(PyObject *object, PyObject *parts) {
  auto *self = reinterpret_cast<CallObject *>(object);
  PyObject *list = PySequence_Fast(parts, "reply() takes a sequence of bytes-like objects");
  if (!list) return nullptr;
  std::vector<Py_buffer> views(size_t(PySequence_Fast_GET_SIZE(list)));
  size_t size = 0, held = 0;
  bool fine = true;
  for (; held < views.size(); held++) {
    if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(list, Py_ssize_t(held)), &views[held], PyBUF_C_CONTIGUOUS) < 0) {
      fine = false;
      break;
    }
    size += size_t(views[held].len);
  }
  if (fine && take(self)) {
    auto answer = std::make_shared<Answer>();
    const size_t most = self->endpoint->endpoint->limits.max_message;
    if (size > most) {
      answer->status = kResourceExhausted;
      answer->details = "Sent message larger than max (" + std::to_string(size) + " vs. " + std::to_string(most) + ")";
    } else {
      try {
        answer->framed = Buffer(size + 5);
        char *to = answer->framed.data();
        const unsigned char prefix[5] = {0, static_cast<unsigned char>(size >> 24), static_cast<unsigned char>(size >> 16),
                                         static_cast<unsigned char>(size >> 8), static_cast<unsigned char>(size)};
        memcpy(to, prefix, 5);
        to += 5;
        for (const Py_buffer &view : views) {
          memcpy(to, view.buf, size_t(view.len));
          to += view.len;
        }
      } catch (const std::bad_alloc &) {
        answer->status = kResourceExhausted;
        answer->details = "no memory for an answer of " + std::to_string(size) + " bytes";
      }
    }
    send(self, std::move(answer));
  }
  for (size_t i = 0; i < held; i++) PyBuffer_Release(&views[i]);
  Py_DECREF(list);
  if (!fine) return nullptr;
  Py_RETURN_NONE;
}

PyObject *call_fail(PyObject *object, PyObject *error) {
  auto *self = reinterpret_cast<CallObject *>(object);
  if (self->call->taken.load()) Py_RETURN_NONE;
  PyObject *explained = PyObject_CallOneArg(self->endpoint->explain, error);
  if (!explained) return nullptr;
  int status;
  const char *details, *pushback;
  Py_ssize_t details_size, pushback_size;
  if (!PyArg_ParseTuple(explained, "is#s#", &status, &details, &details_size, &pushback, &pushback_size)) {
    Py_DECREF(explained);
    return nullptr;
  }
  if (take(self)) {
    auto answer = std::make_shared<Answer>();
    answer->status = status;
    answer->details.assign(details, size_t(details_size));
    answer->pushback.assign(pushback, size_t(pushback_size));
    send(self, std::move(answer));
  }
  Py_DECREF(explained);
  Py_RETURN_NONE;
}

PyObject *call_count(PyObject *object, PyObject *number) {
  auto *self = reinterpret_cast<CallObject *>(object);
  const size_t size = PyLong_AsSize_t(number);
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(self->endpoint->endpoint->count(*self->call, size));
}

int call_buffer(PyObject *object, Py_buffer *view, int flags) {
  const Buffer &message = reinterpret_cast<CallObject *>(object)->call->message;
  return PyBuffer_FillInfo(view, object, message.data(), Py_ssize_t(message.size()), 1, flags);
}

void call_dealloc(PyObject *object) {
  auto *self = reinterpret_cast<CallObject *>(object);
  PyTypeObject *type = Py_TYPE(object);
  Py_CLEAR(self->on_cancel);
  Py_CLEAR(self->endpoint);
  self->call.~CallPtr();
  type->tp_free(object);
  Py_DECREF(type);
}

int is_arrival, is_caller;

PyObject *call_get(PyObject *object, void *which) {
  auto *self = reinterpret_cast<CallObject *>(object);
  if (which == &is_arrival) return PyLong_FromLongLong(self->call->arrival_ns);
  if (which == &is_caller) return PyLong_FromLongLong(self->call->caller);
  return PyLong_FromLongLong(self->call->deadline_ns);
}

int is_parent, is_state;

PyObject *call_trace(PyObject *object, void *which) {
  const auto &trace = reinterpret_cast<CallObject *>(object)->call->trace;
  if (!trace) Py_RETURN_NONE;
  const std::string &text = which == &is_parent ? trace->parent : trace->state;
  if (text.empty()) Py_RETURN_NONE;
  return PyUnicode_DecodeLatin1(text.data(), Py_ssize_t(text.size()), nullptr);
}

PyObject *call_encoding(PyObject *object, void *) {
  switch (reinterpret_cast<CallObject *>(object)->call->encoding) {
    case Encoding::kGzip: return PyUnicode_FromString("gzip");
    case Encoding::kDeflate: return PyUnicode_FromString("deflate");
    default: Py_RETURN_NONE;
  }
}

PyMethodDef call_methods[] = {{"reply", call_reply, METH_O, "Answer with a message, given in parts, and status OK."},
                              {"fail", call_fail, METH_O, "Answer with the status of an error."},
                              {"count", call_count, METH_O, "Count so many more bytes as held by the call."},
                              {nullptr, nullptr, 0, nullptr}};
PyMemberDef call_members[] = {
    {"on_cancel", T_OBJECT, offsetof(CallObject, on_cancel), 0, "Called when the call ends before it was answered."},
    {nullptr, 0, 0, 0, nullptr}};
PyGetSetDef call_properties[] = {
    {"arrival_ns", call_get, nullptr, "When the message was complete, ns, monotonic.", &is_arrival},
    {"deadline_ns", call_get, nullptr, "The client's deadline, ns, monotonic; 2**63 - 1: none.", nullptr},
    {"caller", call_get, nullptr, "Who asks: the number given with their key; 0: nobody known.", &is_caller},
    {"traceparent", call_trace, nullptr, "The header of that name, or None.", &is_parent},
    {"tracestate", call_trace, nullptr, "The header of that name, or None.", &is_state},
    {"encoding", call_encoding, nullptr, "How the message is compressed: None, 'gzip' or 'deflate'.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot call_slots[] = {{Py_tp_dealloc, reinterpret_cast<void *>(call_dealloc)},
                            {Py_tp_methods, call_methods},
                            {Py_tp_members, call_members},
                            {Py_tp_getset, call_properties},
                            {Py_bf_getbuffer, reinterpret_cast<void *>(call_buffer)},
                            {Py_tp_doc, const_cast<char *>("One unary call; its buffer is the request's message.")},
                            {0, nullptr}};
PyType_Spec call_spec = {"service.frontend._native.Call", sizeof(CallObject), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, call_slots};

// ------------------------------------------------------------------------------------------------------------ endpoint

PyObject *endpoint_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
  static const char *names[] = {"listeners",   "method",          "upstream", "max_message", "max_bytes", "max_calls",
                                "max_streams", "max_connections", "idle_ns",  "age_ns",      "age_grace_ns",
                                "unseen",      "explain",         "traced",   nullptr};
  PyObject *listeners, *explain;
  const char *method, *upstream, *details, *pushback;
  Py_ssize_t max_message, max_bytes;
  Limits limits;
  long long idle_ns, age_ns, age_grace_ns;
  Refusal unseen;
  int traced = 0;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!ssnnlIlLLL(iss)O|p", const_cast<char **>(names), &PyList_Type, &listeners,
                                   &method, &upstream, &max_message, &max_bytes, &limits.max_calls, &limits.max_streams,
                                   &limits.max_connections, &idle_ns, &age_ns, &age_grace_ns,
                                   &unseen.status, &details, &pushback, &explain, &traced))
    return nullptr;
  limits.max_message = size_t(max_message);
  limits.max_bytes = size_t(max_bytes);
  limits.idle_ns = idle_ns;
  limits.age_ns = age_ns;
  limits.age_grace_ns = age_grace_ns;
  limits.traced = traced;
  unseen.details = details;
  unseen.pushback = pushback;
  std::vector<int> fds;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(listeners); i++) {
    const long fd = PyLong_AsLong(PyList_GET_ITEM(listeners, i));
    if (PyErr_Occurred()) return nullptr;
    fds.push_back(int(fd));
  }
  auto *self = reinterpret_cast<EndpointObject *>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  new (&self->held) std::atomic<long>(0);
  try {
    self->endpoint = new Endpoint(std::move(fds), method, upstream, limits, std::move(unseen));
  } catch (const std::exception &error) {
    Py_DECREF(self);
    return PyErr_Format(PyExc_OSError, "%s", error.what());
  }
  self->explain = Py_NewRef(explain);
  return reinterpret_cast<PyObject *>(self);
}

void endpoint_dealloc(PyObject *object) {
  auto *self = reinterpret_cast<EndpointObject *>(object);
  PyTypeObject *type = Py_TYPE(object);
  delete self->endpoint;
  Py_CLEAR(self->explain);
  type->tp_free(object);
  Py_DECREF(type);
}

PyObject *endpoint_poll(PyObject *object, PyObject *args) {
  auto *self = reinterpret_cast<EndpointObject *>(object);
  long long look_ns, hand_over_ns;
  double share;
  if (!PyArg_ParseTuple(args, "LLd", &look_ns, &hand_over_ns, &share)) return nullptr;
  Endpoint &endpoint = *self->endpoint;
  Polled polled;
  without_interpreter([&] { polled = endpoint.poll(look_ns, hand_over_ns, share); });
  PyObject *arrived = PyList_New(0), *cancelled = PyList_New(0);
  if (!arrived || !cancelled) return nullptr;
  {
    // Another thread may be ending a stream just now.
    std::lock_guard<std::mutex> guard(endpoint.lock);
    for (CallPtr &call : polled.arrived) {
      if (call->taken.load()) continue;  // ended before anybody knew of it
      auto *item = reinterpret_cast<CallObject *>(call_type->tp_alloc(call_type, 0));
      if (!item) return nullptr;
      new (&item->call) CallPtr(call);
      item->endpoint = reinterpret_cast<EndpointObject *>(Py_NewRef(object));
      item->on_cancel = nullptr;
      call->owner = item;  // this reference is the call's
      if (PyList_Append(arrived, reinterpret_cast<PyObject *>(item)) < 0) return nullptr;
    }
  }
  for (void *owner : polled.cancelled) {
    const int failed = PyList_Append(cancelled, static_cast<PyObject *>(owner));
    Py_DECREF(static_cast<PyObject *>(owner));
    if (failed) return nullptr;
  }
  return Py_BuildValue("NNlO", arrived, cancelled, polled.unseen, polled.ended ? Py_True : Py_False);
}

PyObject *endpoint_hold(PyObject *object, PyObject *) {
  reinterpret_cast<EndpointObject *>(object)->held.fetch_add(1);
  Py_RETURN_NONE;
}

PyObject *endpoint_flush(PyObject *object, PyObject *) {
  auto *self = reinterpret_cast<EndpointObject *>(object);
  self->held.fetch_sub(1);
  if (!self->endpoint->polled_by_me()) without_interpreter([&] {
      self->endpoint->flush();
      self->endpoint->hurry();
    });
  Py_RETURN_NONE;
}

PyObject *endpoint_stop(PyObject *object, PyObject *grace) {
  const long long grace_ns = PyLong_AsLongLong(grace);
  if (PyErr_Occurred()) return nullptr;
  without_interpreter([&] { reinterpret_cast<EndpointObject *>(object)->endpoint->stop(grace_ns); });
  Py_RETURN_NONE;
}

PyObject *endpoint_secure(PyObject *object, PyObject *args) {
  const char *chain, *key, *authorities;
  Py_ssize_t chain_size, key_size, authorities_size;
  if (!PyArg_ParseTuple(args, "y#y#y#", &chain, &chain_size, &key, &key_size, &authorities, &authorities_size))
    return nullptr;
  try {
    TlsContext context = make_tls_context(std::string(chain, size_t(chain_size)), std::string(key, size_t(key_size)),
                                          std::string(authorities, size_t(authorities_size)));
    const int64_t end = end_of(context);
    without_interpreter([&] { reinterpret_cast<EndpointObject *>(object)->endpoint->secure(std::move(context)); });
    return PyLong_FromLongLong(end);
  } catch (const std::exception &error) {
    return PyErr_Format(PyExc_ValueError, "%s", error.what());
  }
}

PyObject *endpoint_admit(PyObject *object, PyObject *args) {
  PyObject *callers;
  long long number;
  int may_infer;
  if (!PyArg_ParseTuple(args, "O!(Lp)", &PyList_Type, &callers, &number, &may_infer)) return nullptr;
  auto access = std::make_shared<Access>();
  access->anonymous = {number, bool(may_infer)};
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(callers); i++) {
    const char *bytes;
    Py_ssize_t size;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(callers, i), "y#Lp", &bytes, &size, &number, &may_infer)) return nullptr;
    Digest digest;
    if (size_t(size) != digest.size()) return PyErr_Format(PyExc_ValueError, "expected SHA-256 digests of 32 bytes");
    memcpy(digest.data(), bytes, digest.size());
    access->callers[digest] = {number, bool(may_infer)};
  }
  without_interpreter([&] { reinterpret_cast<EndpointObject *>(object)->endpoint->admit(std::move(access)); });
  Py_RETURN_NONE;
}

PyObject *endpoint_connections(PyObject *object, void *) {
  return PyLong_FromLong(reinterpret_cast<EndpointObject *>(object)->endpoint->connections.load());
}

PyObject *endpoint_turned_away(PyObject *object, void *) {
  return PyLong_FromLong(reinterpret_cast<EndpointObject *>(object)->endpoint->turned_away.load());
}

PyObject *endpoint_refused(PyObject *object, void *) {
  const Endpoint &endpoint = *reinterpret_cast<EndpointObject *>(object)->endpoint;
  PyObject *counts = PyDict_New();
  for (size_t i = size_t(Why::kShare) + 1; counts && i < endpoint.refused.size(); i++) {
    PyObject *count = PyLong_FromLong(endpoint.refused[i].load(std::memory_order_relaxed));
    if (!count || PyDict_SetItemString(counts, kWhyNames[i], count) < 0) Py_CLEAR(counts);
    Py_XDECREF(count);
  }
  return counts;
}

PyObject *endpoint_calls(PyObject *object, void *) {
  return PyLong_FromLong(reinterpret_cast<EndpointObject *>(object)->endpoint->calls.load());
}

PyObject *endpoint_bytes(PyObject *object, void *) {
  return PyLong_FromSize_t(reinterpret_cast<EndpointObject *>(object)->endpoint->bytes.load());
}

PyMethodDef endpoint_methods[] = {
    {"poll", endpoint_poll, METH_VARARGS, "Wait for calls: (arrived, cancelled, unseen, ended)."},
    {"hold", endpoint_hold, METH_NOARGS, "Answers of other threads than the poller wait for `flush`."},
    {"flush", endpoint_flush, METH_NOARGS, "Send the answers that were held; then what has arrived is handed over."},
    {"stop", endpoint_stop, METH_O, "End, at the latest after so many ns."},
    {"secure", endpoint_secure, METH_VARARGS, "Use TLS: chain, key, client authorities, in PEM."},
    {"admit", endpoint_admit, METH_VARARGS, "Who may call: (digest, number, may_infer) each, and whoever has no key."},
    {nullptr, nullptr, 0, nullptr}};
PyGetSetDef endpoint_properties[] = {{"calls", endpoint_calls, nullptr, "Calls in progress.", nullptr},
                                     {"bytes", endpoint_bytes, nullptr, "Bytes of their messages.", nullptr},
                                     {"connections", endpoint_connections, nullptr, "Clients' connections.", nullptr},
                                     {"refused", endpoint_refused, nullptr, "Calls that were refused here, unseen: why -> how many.", nullptr},
                                     {"turned_away", endpoint_turned_away, nullptr,
                                      "Connections that were one too many.", nullptr},
                                     {nullptr, nullptr, nullptr, nullptr, nullptr}};
PyType_Slot endpoint_slots[] = {{Py_tp_new, reinterpret_cast<void *>(endpoint_new)},
                                {Py_tp_dealloc, reinterpret_cast<void *>(endpoint_dealloc)},
                                {Py_tp_methods, endpoint_methods},
                                {Py_tp_getset, endpoint_properties},
                                {Py_tp_doc, const_cast<char *>("A gRPC server's connections.")},
                                {0, nullptr}};
PyType_Spec endpoint_spec = {"service.frontend._native.Endpoint", sizeof(EndpointObject), 0, Py_TPFLAGS_DEFAULT,
                             endpoint_slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "The native ingress.", -1, nullptr, nullptr, nullptr, nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject *made = PyModule_Create(&module);
  PyObject *endpoint = PyType_FromSpec(&endpoint_spec);
  call_type = reinterpret_cast<PyTypeObject *>(PyType_FromSpec(&call_spec));
  if (!made || !endpoint || !call_type || PyModule_AddObject(made, "Endpoint", endpoint) < 0 ||
      PyModule_AddObject(made, "Call", Py_NewRef(reinterpret_cast<PyObject *>(call_type))) < 0)
    return nullptr;
  return made;
}
