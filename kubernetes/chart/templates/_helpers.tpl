{{/*
The tracks of all groups, as a JSON list: {name, group, track, place, weight, values}. `values` are the values of
`defaults`, with those of the group, and for a canary with its own. `place` is where the track has its own values.
*/}}
{{- define "bundle.tracks" -}}
{{- $tracks := list -}}
{{- range $group, $own := .Values.groups -}}
  {{- $values := mergeOverwrite (dict "settings" dict "env" dict) (deepCopy $.Values.defaults) (deepCopy $own) -}}
  {{- $image := $.Values.image -}}
  {{- range list $.Values.defaults.image $own.image -}}
    {{- $image = include "bundle.changed" (dict "image" $image "changes" .) | fromJson -}}
  {{- end -}}
  {{- $canary := $values.canary -}}
  {{- $values = set (omit $values "canary") "image" $image -}}
  {{- $name := printf "%s-%s" $.Release.Name $group -}}
  {{- $weight := 100 -}}
  {{- if $canary -}}
    {{- $weight = sub 100 (int $canary.weight) -}}
  {{- end -}}
  {{- $place := print "groups." $group -}}
  {{- $track := dict "name" $name "group" $group "track" "stable" "place" $place "weight" $weight -}}
  {{- $tracks = append $tracks (set $track "values" $values) -}}
  {{- if $canary -}}
    {{- $changed := mergeOverwrite (deepCopy $values) (deepCopy (omit $canary "weight" "image")) -}}
    {{- $_ := set $changed "image" (include "bundle.changed" (dict "image" $image "changes" $canary.image) | fromJson) -}}
    {{- $_ := set $changed "autoscaling" (dict "enabled" false) -}}
    {{- $name = print $name "-canary" -}}
    {{- $place = print $place ".canary" -}}
    {{- $track := dict "name" $name "group" $group "track" "canary" "place" $place "weight" (int $canary.weight) -}}
    {{- $tracks = append $tracks (set $track "values" $changed) -}}
  {{- end -}}
{{- end -}}
{{- toJson $tracks -}}
{{- end -}}

{{/* An image with changes, as JSON. A changed tag replaces a digest. */}}
{{- define "bundle.changed" -}}
{{- $changes := deepCopy (.changes | default dict) -}}
{{- if and $changes.tag (not $changes.digest) -}}
  {{- $_ := set $changes "digest" "" -}}
{{- end -}}
{{- toJson (mergeOverwrite (deepCopy .image) $changes) -}}
{{- end -}}

{{/* The labels by which a track's pods are selected. */}}
{{- define "bundle.selector" -}}
app.kubernetes.io/name: torchserve-bundle
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
bundle/group: {{ .track.group | quote }}
bundle/track: {{ .track.track }}
{{- end -}}

{{/* The labels of an object: those of a track, if there is one. */}}
{{- define "bundle.labels" -}}
{{- if .track -}}
{{ include "bundle.selector" . }}
{{- else -}}
app.kubernetes.io/name: torchserve-bundle
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* An image's name: {repository, tag, digest}, and the tag where it has none. */}}
{{- define "bundle.image" -}}
{{- if .image.digest -}}
{{ .image.repository }}@{{ .image.digest }}
{{- else -}}
{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end -}}
{{- end -}}

{{/* A value as text. Helm reads an integer as a floating-point number, and would write 33554432 as 3.3554432e+07. */}}
{{- define "bundle.text" -}}
{{- if kindIs "float64" . }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}

{{/* The security context of every container, except for its user. */}}
{{- define "bundle.confined" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end -}}

{{/* "true" if archives must be signed. */}}
{{- define "bundle.trusted" -}}
{{- if or .Values.trustedKey.pem .Values.trustedKey.secret -}}true{{- end -}}
{{- end -}}

{{/* The environment of `bundle fetch`. */}}
{{- define "bundle.fetching" -}}
{{- $archives := .Values.archives -}}
{{- if include "bundle.trusted" . }}
- {name: TRUSTED_KEY, value: /run/trusted/trusted.pub}
{{- end }}
{{- if $archives.netrcSecret }}
- {name: NETRC, value: /run/netrc/netrc}
{{- end }}
{{- if $archives.caSecret }}
- {name: CA_FILE, value: /run/ca/ca.crt}
{{- end }}
{{- with $archives.s3.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- with $archives.s3.endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with $archives.s3.credentialsSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- {name: {{ . }}, valueFrom: {secretKeyRef: {name: {{ $archives.s3.credentialsSecret | quote }}, key: {{ . }}}}}
{{- end }}
{{- end }}
{{- end -}}

{{/* The models of a track whose number of workers is set: mnist=2 text=1. */}}
{{- define "bundle.workers" -}}
{{- $counts := list -}}
{{- range $model, $set := .models -}}
  {{- if $set.workers -}}
    {{- $counts = append $counts (printf "%s=%d" $model (int $set.workers)) -}}
  {{- end -}}
{{- end -}}
{{- join " " $counts -}}
{{- end -}}

{{/*
The paths of a group, as a JSON list of {type, path}. With one group, these are all paths.
*/}}
{{- define "bundle.paths" -}}
{{- $paths := list -}}
{{- if eq (len .root.Values.groups) 1 -}}
  {{- $paths = append $paths (dict "type" "Prefix" "path" "/") -}}
{{- else -}}
  {{- range $model := keys .track.values.models | sortAlpha -}}
    {{- range list "/predictions/" "/explanations/" "/v2/models/" -}}
      {{- $paths = append $paths (dict "type" "Prefix" "path" (print . $model)) -}}
    {{- end -}}
    {{- range list "" ":predict" ":explain" -}}
      {{- $paths = append $paths (dict "type" "Exact" "path" (print "/v1/models/" $model .)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- toJson $paths -}}
{{- end -}}

{{/*
Checks values that may contain a secret. The schema only has their types: its refusal of a pattern would print the value.
*/}}
{{- define "bundle.validate.secretive" -}}
{{- $pem := .Values.trustedKey.pem | default "" -}}
{{- if contains "PRIVATE KEY" $pem -}}
  {{- fail "trustedKey.pem: this is a private key, which must stay where archives are signed. Give the public key: the .pub file that make keygen wrote" -}}
{{- else if not (regexMatch "^(-----BEGIN PUBLIC KEY-----[^-]+-----END PUBLIC KEY-----\\s*)?$" $pem) -}}
  {{- fail "trustedKey.pem: this is not a public key (PEM). Give the .pub file that make keygen wrote" -}}
{{- end -}}
{{- $names := dict
  "archives.netrcSecret" .Values.archives.netrcSecret
  "archives.caSecret" .Values.archives.caSecret
  "archives.s3.credentialsSecret" .Values.archives.s3.credentialsSecret
  "trustedKey.secret" .Values.trustedKey.secret
  "ingress.tlsSecret" .Values.ingress.tlsSecret
  "tracing.headersSecret" .Values.tracing.headersSecret
-}}
{{- range $index, $name := .Values.pullSecrets -}}
  {{- $_ := set $names (printf "pullSecrets[%d]" $index) $name -}}
{{- end -}}
{{- range $place, $name := $names -}}
  {{- if not (regexMatch "^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$" ($name | default "")) -}}
    {{- fail (printf "%s: this is not the name of a Secret, which has only small letters, digits, - and . in it. Make a Secret with the content, and give its name" $place) -}}
  {{- end -}}
{{- end -}}
{{- if not (regexMatch "^(https?://[A-Za-z0-9.-]+(:[0-9]+)?/?)?$" (.Values.archives.s3.endpoint | default "")) -}}
  {{- fail "archives.s3.endpoint: it must be http:// or https:// with a host and perhaps a port, such as http://minio.storage:9000. Keys belong to the Secret archives.s3.credentialsSecret" -}}
{{- end -}}
{{- if not (regexMatch "^(https?://[A-Za-z0-9.-]+:[1-9][0-9]{0,4})?$" (.Values.tracing.endpoint | default "")) -}}
  {{- fail "tracing.endpoint: it must be http:// or https:// with a host and a port, such as http://otel-collector.monitoring:4317. Keys belong to the Secret tracing.headersSecret" -}}
{{- end -}}
{{- range include "bundle.tracks" . | fromJsonArray -}}
  {{- $place := .place -}}
  {{- range $model, $set := .values.models -}}
    {{- if not (regexMatch "^(https?://[^#\\s]+|s3://[a-z0-9][a-z0-9._-]+/[^#\\s]+)?$" ($set.url | default "")) -}}
      {{- fail (printf "%s.models.%s.url: it must begin with http:// or https://, or be s3://BUCKET/KEY, without # and spaces" $place $model) -}}
    {{- end -}}
  {{- end -}}
  {{- if not (regexMatch "^(https?://.*)?$" (.values.autoscaling.prometheus | default "")) -}}
    {{- fail (printf "%s.autoscaling.prometheus: it must begin with http:// or https://" $place) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Checks the parts of images' names as registries do: {place, image}. A name may have a password: none is quoted. */}}
{{- define "bundle.validate.image" -}}
{{- $image := .image | default dict -}}
{{- $repository := "([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*(:[0-9]+)?/)?[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*" -}}
{{- with $image.repository -}}
  {{- if not (regexMatch (printf "^%s$" $repository) .) -}}
    {{- fail (printf "%s.repository: it must be like registry.example:5000/team/name: small letters, digits, and single dots, underscores or hyphens between them. A tag or a digest has a value of its own" $.place) -}}
  {{- end -}}
{{- end -}}
{{- with $image.tag -}}
  {{- if not (regexMatch "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$" .) -}}
    {{- fail (printf "%s.tag: it must have at most 128 letters, digits, dots, underscores and hyphens, and must not begin with a dot or a hyphen" $.place) -}}
  {{- end -}}
{{- end -}}
{{- with $image.digest -}}
  {{- if not (regexMatch "^sha256:[0-9a-f]{64}$" .) -}}
    {{- fail (printf "%s.digest: it must be sha256: and 64 digits from 0-9 and a-f" $.place) -}}
  {{- end -}}
{{- end -}}
{{- with $image.name -}}
  {{- if not (regexMatch (printf "^%s(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$" $repository) .) -}}
    {{- fail (printf "%s: it must be the name of an image, like registry.example:5000/team/name:tag" $.place) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* What the schema cannot say. */}}
{{- define "bundle.validate" -}}
{{- include "bundle.validate.secretive" . -}}
{{- include "bundle.validate.image" (dict "place" "image" "image" .Values.image) -}}
{{- include "bundle.validate.image" (dict "place" "proxy.image" "image" .Values.proxy.image) -}}
{{- include "bundle.validate.image" (dict "place" "archives.downloader.image" "image" (dict "name" .Values.archives.downloader.image)) -}}
{{- $owners := dict "defaults" .Values.defaults -}}
{{- range $name, $group := .Values.groups -}}
  {{- $_ := set $owners (print "groups." $name) $group -}}
{{- end -}}
{{- range $place, $owner := $owners -}}
  {{- include "bundle.validate.image" (dict "place" (print $place ".image") "image" $owner.image) -}}
  {{- include "bundle.validate.image" (dict "place" (print $place ".canary.image") "image" ($owner.canary | default dict).image) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([a-z0-9-]*[a-z0-9])?$" .Release.Name) -}}
  {{- fail (printf "release %s: names of Services begin with it, so it must begin with a letter, and contain only small letters, digits and -" .Release.Name) -}}
{{- end -}}
{{- if not .Values.groups -}}
  {{- fail "groups: name at least one group of models" -}}
{{- end -}}
{{- $groups := dict -}}
{{- $own := list
  "TS_INFERENCE_ADDRESS" "TS_MANAGEMENT_ADDRESS" "TS_METRICS_ADDRESS"
  "TS_GRPC_INFERENCE_ADDRESS" "TS_GRPC_MANAGEMENT_ADDRESS"
  "TS_MAX_REQUEST_SIZE" "TS_MODEL_STORE" "TS_LOAD_MODELS"
  "BUNDLE_ADDRESS" "BUNDLE_ARCHIVES" "BUNDLE_BEHIND_PROXY" "BUNDLE_DRAIN_SECONDS" "BUNDLE_GATE" "BUNDLE_MODELS"
  "BUNDLE_PATIENCE_SECONDS" "BUNDLE_START_SECONDS" "BUNDLE_STATE" "BUNDLE_WORKERS"
  "NVIDIA_VISIBLE_DEVICES" "TRUSTED_KEY"
  "OTEL_EXPORTER_OTLP_ENDPOINT" "OTEL_EXPORTER_OTLP_HEADERS" "OTEL_TRACES_SAMPLER" "OTEL_TRACES_SAMPLER_ARG"
-}}
{{- range include "bundle.tracks" . | fromJsonArray -}}
  {{- $track := . -}}
  {{- /* Kubernetes appends up to 17 characters to a pod's name, and cuts what is longer than 63: the queries of KEDA
         would not match it */ -}}
  {{- if gt (len .name) 46 -}}
    {{- fail (printf "%s: the name %s is longer than 46 characters: shorten the release's or the group's name" .place .name) -}}
  {{- end -}}
  {{- if not .values.models -}}
    {{- fail (printf "%s.models: name at least one model" .place) -}}
  {{- end -}}
  {{- range $model, $set := .values.models -}}
    {{- if and (eq $.Values.archives.source "url") (not (and $set.sha256 (or $set.url $.Values.archives.downloader.image))) -}}
      {{- fail (printf "%s.models.%s: archives.source=url needs its sha256, and its url or archives.downloader.image" $track.place $model) -}}
    {{- end -}}
    {{- if and $set.url $.Values.archives.downloader.image -}}
      {{- fail (printf "%s.models.%s: archives.downloader gets it, so it needs no url" $track.place $model) -}}
    {{- end -}}
    {{- if and (ne $.Values.archives.source "url") (or $set.url $set.sha256) -}}
      {{- fail (printf "%s.models.%s: url and sha256 need archives.source=url" $track.place $model) -}}
    {{- end -}}
    {{- if and (eq $track.track "stable") (hasKey $groups $model) (or $.Values.ingress.enabled $.Values.gateway.enabled) -}}
      {{- fail (printf "groups: %s is in %s and in %s, and a route leads to one of them" $model (get $groups $model) $track.group) -}}
    {{- end -}}
    {{- if eq $track.track "stable" -}}
      {{- $_ := set $groups $model $track.group -}}
    {{- end -}}
  {{- end -}}
  {{- range $key, $_ := .values.settings -}}
    {{- if has (printf "TS_%s" (upper $key)) $own -}}
      {{- fail (printf "%s.settings.%s: the chart sets it" $track.place $key) -}}
    {{- end -}}
  {{- end -}}
  {{- if or (hasKey .values.settings "disable_token_authorization") (hasKey .values.env "TS_DISABLE_TOKEN_AUTHORIZATION") -}}
    {{- fail (printf "%s: disable_token_authorization cannot be set: TorchServe makes keys of its own in each pod, so clients of a Service cannot have one: check tokens in the ingress or the gateway" .place) -}}
  {{- end -}}
  {{- range $name, $_ := .values.env -}}
    {{- if or (has $name $own) (and (hasPrefix "TS_" $name) (hasKey $track.values.settings (trimPrefix "TS_" $name | lower))) -}}
      {{- fail (printf "%s.env.%s: the chart sets it" $track.place $name) -}}
    {{- end -}}
  {{- end -}}
  {{- if and $.Values.ingress.enabled (eq .track "canary") (not (contains "nginx" $.Values.ingress.className)) -}}
    {{- fail (printf "groups.%s.canary: the controllers of Ingresses other than ingress-nginx ignore its weight: use gateway" .group) -}}
  {{- end -}}
  {{- if and $.Values.gateway.enabled (gt (len $.Values.groups) 1) (gt (len .values.models) 21) -}}
    {{- fail (printf "%s.models: an HTTPRoute has no more than 128 paths, which is 21 models: use more groups" .place) -}}
  {{- end -}}
  {{- $scaling := .values.autoscaling -}}
  {{- if $scaling.enabled -}}
    {{- if gt (int $scaling.min) (int $scaling.max) -}}
      {{- fail (printf "%s.autoscaling: min is %d, and max is %d" .place (int $scaling.min) (int $scaling.max)) -}}
    {{- end -}}
    {{- if and (eq (int $scaling.min) 0) (or (ne $scaling.by "queue") (not $scaling.activation)) -}}
      {{- fail (printf "%s.autoscaling: min=0 needs by=queue, and activation: while no pod runs, only something in front of the pods can count requests" .place) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if ne .Values.archives.source "url" -}}
  {{- range $name := list "netrcSecret" "caSecret" -}}
    {{- if get $.Values.archives $name -}}
      {{- fail (printf "archives.%s: it needs archives.source=url" $name) -}}
    {{- end -}}
  {{- end -}}
  {{- if or (values .Values.archives.s3 | join "") .Values.archives.downloader.image -}}
    {{- fail "archives: s3 and downloader need archives.source=url" -}}
  {{- end -}}
{{- end -}}
{{- with .Values.tracing -}}
  {{- /* as docker/nginx/start.sh checks it */ -}}
  {{- if not (regexMatch "^(0(\\.[0-9]{1,4})?|1)$" (toString .ratio)) -}}
    {{- fail (printf "tracing.ratio: %v must be a number from 0 to 1 with at most four decimal places" .ratio) -}}
  {{- end -}}
  {{- if gt (.endpoint | default "" | regexFind "[0-9]+$" | int) 65535 -}}
    {{- fail (printf "tracing.endpoint: %s has a port beyond 65535" .endpoint) -}}
  {{- end -}}
  {{- if and .headersSecret (not .endpoint) -}}
    {{- fail "tracing.headersSecret: it needs tracing.endpoint" -}}
  {{- end -}}
{{- end -}}
{{- if and .Values.configProperties (not (regexMatch "(?m)^enable_envvars_config=true\\s*$" .Values.configProperties)) -}}
  {{- fail "configProperties: without the line enable_envvars_config=true, TorchServe ignores what the chart sets" -}}
{{- end -}}
{{- if regexMatch "(?m)^disable_token_authorization=false\\s*$" (.Values.configProperties | default "") -}}
  {{- fail "configProperties: disable_token_authorization=false has no effect: TorchServe makes keys of its own in each pod, so clients of a Service cannot have one: check tokens in the ingress or the gateway" -}}
{{- end -}}
{{- if and .Values.gateway.enabled (not .Values.gateway.parents) -}}
  {{- fail "gateway.parents: name the Gateway to which the route belongs" -}}
{{- end -}}
{{- end -}}

{{/* A runbook of the alerts, with the commands of a cluster instead of those of the Docker stack. */}}
{{- define "bundle.runbook" -}}
{{- $pods := printf "-l app.kubernetes.io/instance=%s" .root.Release.Name -}}
{{- $kubectl := printf "kubectl -n %s" .root.Release.Namespace -}}
{{- $logs := printf "%s logs %s -c torchserve" $kubectl $pods -}}
{{- $stack := "docker compose -p torchserve-bundle" -}}
{{- .text
  | replace (print $stack " ps torchserve") (print $kubectl " get pods " $pods)
  | replace (print $stack " logs --tail 100 torchserve") (print $logs " --tail=100 --previous")
  | replace (print $stack " logs torchserve") (print $logs " --tail=-1")
  | replace (print $stack " restart torchserve") (print $kubectl " rollout restart deployment " $pods)
  | replace "With the same REPLICAS, `make up` starts it" "Kubernetes starts it again"
  | replace "`make manage CALL=\"PUT /models/{{ $labels.model_name }}?min_worker=2&max_worker=2\"`" "`workers` of the model in the chart's values"
-}}
{{- end -}}
