{{/* The alerts, as a list: name, expression, for how long, how urgent (page or ticket), and what is said. Each has a
section of its name in docs/operations.md. Two braces inside the texts are Prometheus', not Helm's. */}}
{{- define "onclock.alerts" -}}
{{- $root := .root -}}
{{- $rule := .root.Values.prometheusRule -}}
{{- $s := .s -}}
{{- $own := .own -}}
{{- $budget := .budget -}}
{{- $enough := .enough -}}
# The promise. Burn rate 1 uses up the error budget in exactly 30 days. Two windows: the long one says that it matters, the
# short one that it still goes on. The factors are those of the SRE workbook: 14.4 for an hour is 2 % of the budget, 6 for
# six hours is 5 %, 3 for a day and 1 for three days are 10 %.
- alert: OnclockSloFastBurn
  severity: page
  expr: |
    (
      model:onclock_broken:ratio_rate1h{ {{- $own -}} } > 14.4 * {{ $budget }}
      and
      model:onclock_broken:ratio_rate5m{ {{- $own -}} } > 14.4 * {{ $budget }}
      and
      3600 * model:onclock_offered:rate1h{ {{- $own -}} } {{ $enough }}
    )
    or
    (
      model:onclock_broken:ratio_rate6h{ {{- $own -}} } > 6 * {{ $budget }}
      and
      model:onclock_broken:ratio_rate30m{ {{- $own -}} } > 6 * {{ $budget }}
      and
      21600 * model:onclock_offered:rate6h{ {{- $own -}} } {{ $enough }}
    )
  summary: "{{ `Model {{ $labels.model }} breaks its promise` }}"
  description: "{{ `{{ $value | humanizePercentage }} of the requests for model {{ $labels.model }} were late, refused or failed over the last hour or six hours: the error budget of 30 days will be gone in days.` }}"
- alert: OnclockSloSlowBurn
  severity: ticket
  expr: |
    (
      model:onclock_broken:ratio_rate1d{ {{- $own -}} } > 3 * {{ $budget }}
      and
      model:onclock_broken:ratio_rate2h{ {{- $own -}} } > 3 * {{ $budget }}
      and
      86400 * model:onclock_offered:rate1d{ {{- $own -}} } {{ $enough }}
    )
    or
    (
      model:onclock_broken:ratio_rate3d{ {{- $own -}} } > {{ $budget }}
      and
      model:onclock_broken:ratio_rate6h{ {{- $own -}} } > {{ $budget }}
      and
      259200 * model:onclock_offered:rate3d{ {{- $own -}} } {{ $enough }}
    )
  summary: "{{ `Model {{ $labels.model }} slowly uses up its error budget` }}"
  description: "{{ `{{ $value | humanizePercentage }} of the requests for model {{ $labels.model }} were late, refused or failed over the last one or three days: more than the objective allows.` }}"
# What breaks it.
- alert: OnclockRefusingRequests
  severity: ticket
  for: 10m
  expr: |
    sum by (model) (rate(nv_inference_request_failure{ {{- $s }},reason="REJECTED"}[5m]))
    / on (model) (model:onclock_offered:rate5m{ {{- $own -}} } > 0)
    > {{ $rule.refusalRatio }}
  summary: "{{ `Requests for model {{ $labels.model }} are refused` }}"
  description: "{{ `{{ $value | humanizePercentage }} of the requests for model {{ $labels.model }} are refused, since their deadline cannot be met.` }}"
- alert: OnclockDeadlinesUnreachable
  severity: ticket
  for: 10m
  expr: |
    sum by (model) (rate(onclock_refusals_total{ {{- $s }},reason="unreachable"}[5m]))
    / on (model) (model:onclock_offered:rate5m{ {{- $own -}} } > 0)
    > {{ $rule.refusalRatio }}
  summary: "{{ `Deadlines for model {{ $labels.model }} that no server could meet` }}"
  description: "{{ `{{ $value | humanizePercentage }} of the requests for model {{ $labels.model }} have a deadline that is too short even when nothing else runs. More replicas do not help.` }}"
- alert: OnclockRequestsFailing
  severity: ticket
  for: 5m
  expr: |
    (
      sum by (model) (rate(nv_inference_request_failure{ {{- $s }},reason="BACKEND"}[5m]))
      / on (model) (model:onclock_offered:rate5m{ {{- $own -}} } > 0)
      > {{ $rule.failureRatio }}
    )
    or
    (
      sum by (model) (rate(onclock_failures_total{ {{- $s }},reason="internal"}[5m])) > 0
    )
  summary: "{{ `Model {{ $labels.model }} fails` }}"
  description: "{{ `Requests for model {{ $labels.model }} fail while they run: in the model, for want of device memory, or by a fault of the server.` }}"
- alert: OnclockSaturated
  severity: ticket
  for: 10m
  expr: |
    avg(avg_over_time(onclock_saturation_ratio{ {{- $s -}} }[5m])) > {{ $rule.saturation }}
  summary: "The pods are full"
  description: "{{ `On average the pods are asked for {{ $value | humanizePercentage }} of what they can answer within the objectives. Beyond 100 % they refuse.` }}"
- alert: OnclockUnbalanced
  severity: ticket
  for: 15m
  expr: |
    max(avg_over_time(onclock_saturation_ratio{ {{- $s -}} }[5m])) - min(avg_over_time(onclock_saturation_ratio{ {{- $s -}} }[5m])) > 0.5
  summary: "Some pods are full while others are idle"
  description: "{{ `Between the fullest pod and the emptiest there are {{ $value | humanizePercentage }} of a pod's capacity: calls are not balanced.` }}"
# Models.
- alert: OnclockModelLoadFailing
  severity: ticket
  expr: |
    max by (model) (onclock_model_load_failed{ {{- $s }}}) > 0
  summary: "{{ `Model {{ $labels.model }} cannot be loaded` }}"
  description: "{{ `The last attempt to load model {{ $labels.model }}, or a version of it, failed. What served before serves on.` }}"
- alert: OnclockModelNotEverywhere
  severity: ticket
  for: 15m
  expr: |
    count by (model) (max by (model, pod) (onclock_model_ready{ {{- $s -}} }) == 1)
    < scalar(count(up{ {{- $s -}} } == 1))
  summary: "{{ `Model {{ $labels.model }} does not serve on every pod` }}"
  description: "{{ `Only {{ $value }} pods serve model {{ $labels.model }}; requests for it that reach another pod fail.` }}"
# Devices and processes.
- alert: OnclockDeviceFailed
  severity: page
  expr: |
    min by (pod, device) (min_over_time(onclock_device_healthy{ {{- $s -}} }[15m])) == 0
  summary: "{{ `Device {{ $labels.device }} of pod {{ $labels.pod }} has failed` }}"
  description: "{{ `Device {{ $labels.device }} of pod {{ $labels.pod }} broke or hung within the last 15 minutes; the server ended with exit code 75 and was started again.` }}"
- alert: OnclockDeviceSlow
  severity: ticket
  for: 15m
  expr: |
    max by (model, pod) (onclock_latency_scale{ {{- $s -}} }) > 1.5
  summary: "{{ `Pod {{ $labels.pod }} is slower than when it was measured` }}"
  description: "{{ `Model {{ $labels.model }} takes {{ $value | humanize }} times as long on pod {{ $labels.pod }} as when it was loaded: less capacity, and tighter deadlines are refused.` }}"
- alert: OnclockDeviceMemoryShort
  severity: ticket
  expr: |
    sum by (model, pod) (rate(onclock_failures_total{ {{- $s }},reason="out_of_memory"}[5m])) > 0
    or
    min by (model, pod) (onclock_batch_rows_limit{ {{- $s -}} }) < min by (model, pod) (onclock_batch_rows_limit{ {{- $s -}} } offset 1h)
  summary: "{{ `Pod {{ $labels.pod }} is short of device memory` }}"
  description: "{{ `Model {{ $labels.model }} ran out of device memory on pod {{ $labels.pod }}: its batches are smaller now, or single requests fail.` }}"
- alert: OnclockRestarting
  severity: ticket
  expr: |
    sum by (pod) (changes(process_start_time_seconds{ {{- $s -}} }[1h])) >= 3
  summary: "{{ `Pod {{ $labels.pod }} keeps restarting` }}"
  description: "{{ `The server of pod {{ $labels.pod }} was started {{ $value }} times within an hour.` }}"
# Certificates and keys.
- alert: OnclockCertificateExpiring
  severity: ticket
  expr: |
    min by (pod) (onclock_certificate_end_timestamp_seconds{ {{- $s -}} }) - time() < {{ include "onclock.text" $rule.certificateDays }} * 86400
  summary: "{{ `The certificate of pod {{ $labels.pod }} is about to end` }}"
  description: "{{ `The certificate that pod {{ $labels.pod }} serves ends in {{ $value | humanizeDuration }}: nobody can connect then.` }}"
- alert: OnclockSecurityChangeFailing
  severity: ticket
  expr: |
    sum by (pod, what) (increase(onclock_security_changes_total{ {{- $s }},result="failed"}[30m])) > 0
    or
    sum by (pod, what) (
      onclock_security_changes_total{ {{- $s }},result="failed"}
      unless onclock_security_changes_total{ {{- $s }},result="failed"} offset 30m
    ) > 0
  summary: "{{ `Pod {{ $labels.pod }} cannot use a changed file ({{ $labels.what }})` }}"
  description: "{{ `A change of what pod {{ $labels.pod }} is secured with ({{ $labels.what }}) could not be used in the last half hour: what was in force still is.` }}"
- alert: OnclockDown
  severity: page
  for: 5m
  expr: |
    absent(up{ {{- $s -}} } == 1)
  summary: "No onclock server answers"
  description: "Prometheus finds no pod that answers a scrape: nothing serves, or the targets are not found."
{{- end }}
