// loadgen-grpcpp: the same load through the stock gRPC C++ client (one completion queue,
// one thread, generic stub, messages encoded once). The cross-check of loadgen.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <memory>

#include "common.h"

struct Call {
  std::unique_ptr<grpc::ClientContext> ctx;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> rd;
  grpc::ByteBuffer resp;
  grpc::Status status;
  int64_t intended = 0;
};

int main(int argc, char **argv) {
  Options o = parse_args(argc, argv);
  if (o.protocol != "grpc") die("gRPC only");
  if (!o.records.empty() || !o.rows.empty()) die("--records and --rows: use loadgen");
  prctl(PR_SET_TIMERSLACK, 1);
  Stats st;
  std::vector<grpc::ByteBuffer> bodies;
  for (auto &raw : make_tensors(o)) {
    grpc::Slice s(encode_infer(o, raw));
    bodies.emplace_back(&s, 1);
  }
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs;
  std::vector<std::shared_ptr<grpc::Channel>> chans;
  for (int i = 0; i < o.connections; i++) {
    grpc::ChannelArguments a;
    a.SetInt("grpc.use_local_subchannel_pool", 1);
    a.SetMaxReceiveMessageSize(-1);
    a.SetMaxSendMessageSize(-1);
    auto c = grpc::CreateCustomChannel(o.host + ":" + o.port, grpc::InsecureChannelCredentials(), a);
    if (!c->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(5))) die("cannot connect");
    chans.push_back(c);
    stubs.emplace_back(new grpc::GenericStub(c));
  }
  std::string method = o.path.empty() ? "/inference.GRPCInferenceService/ModelInfer" : o.path;
  grpc::CompletionQueue cq;
  long inflight = 0, credit = o.concurrency;
  size_t rr = 0, br = 0;
  std::vector<Call *> pool;
  auto start = [&](int64_t at) {
    Call *c;
    if (pool.empty()) c = new Call;
    else { c = pool.back(); pool.pop_back(); }
    c->ctx.reset(new grpc::ClientContext);
    if (o.deadline_ms > 0) c->ctx->set_deadline(std::chrono::system_clock::now() + std::chrono::microseconds(long(o.deadline_ms * 1000)));
    for (auto &h : o.headers) c->ctx->AddMetadata(h.first, h.second);
    c->intended = at;
    inflight++;
    st.on_sent(at, now_ns());
    c->rd = stubs[rr++ % stubs.size()]->PrepareUnaryCall(c->ctx.get(), method, bodies[br++ % bodies.size()], &cq);
    c->rd->StartCall();
    c->rd->Finish(&c->resp, &c->status, c);
  };
  int64_t t0 = now_ns() + 50000000;
  st.win0 = t0 + int64_t(o.warmup * 1e9);
  st.win1 = st.win0 + int64_t(o.duration * 1e9);
  st.slo_ms = o.slo_ms;
  int64_t hard_end = st.win1 + int64_t(o.drain * 1e9);
  bool open = o.open();
  Arrivals arr;
  if (open) arr.init(o, t0);
  for (;;) {
    int64_t t = now_ns();
    st.sample(o, t);
    bool sending = t < st.win1;
    if (!sending && st.sampled1 && (inflight == 0 || t >= hard_end)) break;
    if (sending) {
      if (open) {
        for (int k = 0; k < 256 && arr.next() <= t; k++) {
          int64_t at = arr.next();
          arr.step();
          if (at < st.win1) start(at);
        }
      } else if (t >= t0) while (credit > 0) { credit--; start(now_ns()); }
    }
    int64_t wake = !sending ? hard_end : std::min(st.win1, open ? arr.next() : (credit > 0 ? t0 : st.win1));
    if (sending && t < st.win0) wake = std::min(wake, st.win0);
    gpr_timespec dl = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_nanos(std::max<int64_t>(0, wake - now_ns()), GPR_TIMESPAN));
    void *tag;
    bool ok;
    for (int k = 0; k < 256; k++) {
      auto r = cq.AsyncNext(&tag, &ok, dl);
      if (r != grpc::CompletionQueue::GOT_EVENT) break;
      Call *c = (Call *)tag;
      st.on_done(c->intended, now_ns(), int(c->status.error_code()), 0);
      inflight--;
      if (!open) credit++;
      c->rd.reset();
      c->resp.Clear();
      pool.push_back(c);
      dl = gpr_time_0(GPR_CLOCK_MONOTONIC);
    }
  }
  if (inflight) st.errors[ST_UNFINISHED] += inflight;
  report(o, st);
  fflush(stdout);
  _exit(0);
}
