# docker build -t dumo .
# docker build -t dumo --build-arg INDEX=https://pypi.org/simple .    # for NVIDIA GPUs: PyPI's torch brings CUDA
FROM python:3.11-slim-bookworm
ARG INDEX=https://download.pytorch.org/whl/cpu
# torch.compile calls a C++ compiler
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE /opt/dumo/
COPY src /opt/dumo/src
RUN pip install --no-cache-dir --extra-index-url "$INDEX" -c /opt/dumo/constraints.txt '/opt/dumo[demo,pretrained,quantised]'
# any user can run it: `docker run --user "$(id -u)"`; USER is what torch calls the folder of compiled code
# /tmp/.cache is any user's, too, or Docker makes it as root's above a folder that is mounted there
RUN useradd dumo && install --directory --owner dumo /work && install --directory --mode 1777 /tmp/.cache
ENV HOME=/tmp USER=dumo NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER dumo
WORKDIR /work
ENTRYPOINT ["dumo"]
CMD ["--help"]
