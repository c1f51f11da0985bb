# An image with everything but the models, for machines without a checkout of this project:
#
#   docker build -t triton-sam .
#   docker run --rm --gpus all --init --shm-size 2g -p 127.0.0.1:8000-8002:8000-8002 \
#     -v "$PWD/model_repository:/models:ro" triton-sam
#
# It adds to NVIDIA's image: the choice of models whose files are there, the key of the
# administrative endpoints, this project's own Python backends, Pillow for the models that take
# image files, a user without privileges, and a health check. docker-compose.yml uses it with TRITON_SAM_IMAGE=triton-sam.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.10-py3
FROM ${TRITON_IMAGE}

# What the predictors run with. Pillow's is the version of triton_sam/server/requirements.txt, so
# that both decode the same pixels; ONNX Runtime's is built for CUDA 13, as the image is. redis and
# safetensors are for TRITON_SAM_STORE_REDIS.
ARG ONNXRUNTIME=onnxruntime-gpu
ARG ONNXRUNTIME_VERSION=1.31.1
RUN python3 -m pip install --no-cache-dir --no-deps --break-system-packages \
      numpy==2.4.6 pillow==12.3.0 pycocotools==2.0.11 redis==8.1.0 safetensors==0.8.0 \
      "${ONNXRUNTIME}==${ONNXRUNTIME_VERSION}"

COPY triton_sam/errors.py /opt/triton-sam/triton_sam/
COPY triton_sam/server /opt/triton-sam/triton_sam/server
COPY triton_sam /opt/triton-sam/package
COPY triton_sam/server/backends/sam /opt/tritonserver/backends/sam

# The onnxruntime of the embedded server stays out: the container has Triton's own, in C++.
RUN for backend in /opt/triton-sam/triton_sam/server/backends/*/; do \
      name="$(basename "$backend")"; \
      [ "$name" = onnxruntime ] || cp -r "$backend" "/opt/tritonserver/backends/$name"; \
    done

ENV PYTHONPATH=/opt/triton-sam PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
  CMD ["curl", "--fail", "--silent", "http://localhost:8000/v2/health/ready"]
CMD ["python3", "-m", "triton_sam.server.container", \
     "--model-repository=/models", "--disable-auto-complete-config", "--exit-timeout-secs=30"]
