{{/* Names. 63 characters is what a DNS label holds; suffixes such as -headless need room within them. */}}
{{- define "onclock.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "onclock.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "onclock.name" .) .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "onclock.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "onclock.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "onclock.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Labels. The component keeps the pods of `helm test` out of the Services. */}}
{{- define "onclock.selectorLabels" -}}
app.kubernetes.io/name: {{ include "onclock.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end }}

{{- define "onclock.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "onclock.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "onclock.labels" -}}
{{ include "onclock.commonLabels" . }}
app.kubernetes.io/component: server
{{- end }}

{{/* An image reference from `{repository, tag, digest}`; the digest wins. */}}
{{- define "onclock.imageOf" -}}
{{- $image := index . 0 -}}
{{- $tag := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest }}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $tag $image.tag) }}
{{- end }}
{{- end }}

{{- define "onclock.image" -}}
{{- include "onclock.imageOf" (list .Values.image .Chart.AppVersion) }}
{{- end }}

{{/* A number as the server reads it. Helm holds numbers of values files as floats and would write 268435456 as 2.68435456e+08. */}}
{{- define "onclock.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}
{{- int64 . }}
{{- else -}}
{{- . }}
{{- end }}
{{- end }}

{{- define "onclock.headlessName" -}}
{{- printf "%s-headless" (include "onclock.fullname" .) }}
{{- end }}

{{/* Seconds from the moment a pod is told to go until it is killed: the pre-stop pause, the grace period for accepted
requests, and what the server needs to close connections after that (15 s: it gives gRPC, its ingress and the last batch
5.5, 5.5 and 1 s). */}}
{{- define "onclock.terminationGracePeriodSeconds" -}}
{{- if kindIs "invalid" .Values.drain.terminationGracePeriodSeconds -}}
{{- add (ceil .Values.config.grace_period_s | int) (int .Values.drain.preStopSeconds) 15 }}
{{- else -}}
{{- int .Values.drain.terminationGracePeriodSeconds }}
{{- end }}
{{- end }}

{{/* Seconds that a pod may take to become ready; the Deployment's own limit must not be shorter. */}}
{{- define "onclock.startupSeconds" -}}
{{- mul (int .Values.probes.startup.periodSeconds) (int .Values.probes.startup.failureThreshold) }}
{{- end }}

{{/* The server's configuration: one ONCLOCK_* variable for each setting. */}}
{{- define "onclock.environment" -}}
ONCLOCK_MODEL_REPOSITORY: {{ .Values.modelRepository.path | quote }}
ONCLOCK_HOST: {{ .Values.host | quote }}
ONCLOCK_GRPC_PORT: {{ include "onclock.text" .Values.ports.grpc | quote }}
ONCLOCK_METRICS_PORT: {{ ternary (include "onclock.text" .Values.ports.metrics) "off" .Values.metrics.enabled | quote }}
ONCLOCK_PROFILE_CACHE: {{ ternary "none" .Values.profileCache.path (eq .Values.profileCache.type "none") | quote }}
{{- range $name, $value := .Values.config }}
{{- if not (kindIs "invalid" $value) }}
{{- if and (eq $name "device") (eq $value "auto") $.Values.gpu.enabled }}
{{- /* A pod that was given a GPU must not quietly serve from the CPU. */}}
{{- $value = "cuda" }}
{{- end }}
ONCLOCK_{{ upper $name }}: {{ include "onclock.text" $value | quote }}
{{- end }}
{{- end }}
{{- if .Values.tls.enabled }}
ONCLOCK_TLS_CERTIFICATE: {{ printf "/etc/onclock/tls/%s" .Values.tls.certificateKey | quote }}
ONCLOCK_TLS_KEY: {{ printf "/etc/onclock/tls/%s" .Values.tls.keyKey | quote }}
{{- if .Values.tls.clientCA.enabled }}
ONCLOCK_TLS_CLIENT_CA: {{ printf "/etc/onclock/client-ca/%s" .Values.tls.clientCA.key | quote }}
{{- end }}
{{- end }}
{{- if .Values.apiKeys.secretName }}
ONCLOCK_API_KEYS: {{ printf "/etc/onclock/api-keys/%s" .Values.apiKeys.key | quote }}
{{- end }}
{{- end }}

{{/* The port of the collector that spans are sent to; empty where there is none. */}}
{{- define "onclock.collectorPort" -}}
{{- $endpoint := .Values.config.otlp_endpoint | default "none" -}}
{{- if ne $endpoint "none" -}}
{{- $url := urlParse $endpoint -}}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}
{{- end }}

{{/* Whether the Deployment's number of replicas is somebody else's business. */}}
{{- define "onclock.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled }}true{{ end }}
{{- end }}

{{- define "onclock.modelClaim" -}}
{{- if eq .Values.modelRepository.type "existingClaim" -}}
{{- .Values.modelRepository.existingClaim.name }}
{{- else -}}
{{- printf "%s-models" (include "onclock.fullname" .) }}
{{- end }}
{{- end }}

{{/* One probe. gRPC probes of Kubernetes speak plain text only, so with TLS the metrics port is asked, by HTTP. A command in
the container could ask over TLS as well, but it would start a process every few seconds beside the one whose latency is
promised, and with mutual TLS it would need a client's certificate. Arguments: root, kind. */}}
{{- define "onclock.probe" -}}
{{- $root := index . 0 -}}
{{- $kind := index . 1 -}}
{{- $probe := index $root.Values.probes $kind -}}
{{- if $probe.handler -}}
{{ toYaml $probe.handler }}
{{- else if $root.Values.tls.enabled -}}
httpGet:
  path: {{ ternary "/livez" "/readyz" (eq $kind "liveness") }}
  port: metrics
  scheme: {{ ternary "HTTPS" "HTTP" $root.Values.config.metrics_tls }}
{{- else -}}
grpc:
  port: {{ include "onclock.text" $root.Values.ports.grpc }}
  service: {{ $probe.service | quote }}
{{- end }}
periodSeconds: {{ include "onclock.text" $probe.periodSeconds }}
timeoutSeconds: {{ include "onclock.text" $probe.timeoutSeconds }}
failureThreshold: {{ include "onclock.text" $probe.failureThreshold }}
{{- end }}

{{/* Labels that select this release's series in Prometheus. */}}
{{- define "onclock.seriesSelector" -}}
{{- if .Values.metrics.seriesSelector -}}
{{- .Values.metrics.seriesSelector }}
{{- else -}}
{{- printf "namespace=%q,job=%q" .Release.Namespace (include "onclock.fullname" .) }}
{{- end }}
{{- end }}

{{/* Host and port of the Service, from within the cluster. */}}
{{- define "onclock.address" -}}
{{- printf "%s.%s.svc:%s" (include "onclock.fullname" .) .Release.Namespace (include "onclock.text" .Values.service.grpcPort) }}
{{- end }}
