import grpc from 'k6/net/grpc';
import encoding from 'k6/encoding';
import { check } from 'k6';

const client = new grpc.Client();
const pixels = encoding.b64encode(new Float32Array(64).fill(8).buffer);

export const options = {
  scenarios: {
    open: { executor: 'constant-arrival-rate', rate: 200, timeUnit: '1s', duration: '5s', preAllocatedVUs: 20 },
  },
  thresholds: { checks: ['rate>0.99'], grpc_req_duration: ['p(99)<50'] },
};

export default () => {
  if (__ITER == 0) client.connect(__ENV.SERVER || 'localhost:8001', { plaintext: true, reflect: true });
  const answer = client.invoke('inference.GRPCInferenceService/ModelInfer', {
    model_name: 'digits',
    inputs: [{ name: 'pixels', datatype: 'FP32', shape: [1, 64] }],
    raw_input_contents: [pixels],
  });
  check(answer, { 'in time': (r) => r.status === grpc.StatusOK });
};
