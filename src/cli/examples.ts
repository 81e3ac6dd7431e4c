/** What the help of each command ends with: two command lines that do something. */
export const EXAMPLES: Readonly<Record<string, readonly [string, string]>> = {
  create: ['create -f qcow2 disk.qcow2 20G', 'create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2'],
  convert: [
    'convert -f raw -O qcow2 -c disk.raw disk.qcow2',
    'convert -p -O raw -l before-upgrade disk.qcow2 disk.raw',
  ],
  info: ['info disk.qcow2', 'info --backing-chain --output=json overlay.qcow2'],
  map: ['map disk.qcow2', 'map --output=json disk.qcow2'],
  check: ['check disk.qcow2', 'check -r leaks disk.qcow2'],
  measure: ['measure -O qcow2 disk.raw', 'measure -O qcow2 --size 20G'],
  compare: ['compare disk.raw disk.qcow2', 'compare -s -p a.qcow2 b.qcow2'],
  snapshot: ['snapshot -c before-upgrade disk.qcow2', 'snapshot -l disk.qcow2'],
  bitmap: ['bitmap --add disk.qcow2 since-monday', 'bitmap --merge since-monday -b old.qcow2 -F qcow2 disk.qcow2 all'],
  resize: ['resize disk.qcow2 +10G', 'resize --shrink disk.qcow2 8G'],
  amend: ['amend -o compat=v3 disk.qcow2', 'amend -f qcow2 -o help'],
  commit: ['commit overlay.qcow2', 'commit -p -b base.qcow2 overlay.qcow2'],
  rebase: ['rebase -b new-base.qcow2 -F qcow2 overlay.qcow2', 'rebase -u -b moved/base.qcow2 -F qcow2 overlay.qcow2'],
  report: ['report disk.qcow2 -o report.html', 'report overlay.qcow2 > report.html'],
  compact: ['compact disk.qcow2', 'compact --dry-run disk.qcow2'],
  dd: ['dd if=disk.qcow2 of=first-mib.raw bs=1M count=1', 'dd -O qcow2 if=disk.raw of=disk.qcow2 bs=64k'],
  bench: ['bench -c 10000 disk.qcow2', 'bench -w -t none -s 64k -d 16 scratch.qcow2'],
  worker: [
    'worker --redis redis://queue.internal --root /srv/images --concurrency 2',
    'worker --redis unix:///run/redis/redis.sock --root . --queue thumbnails --rate 200M',
  ],
  shims: ['shims ~/.local/qcow2', 'shims --force ./bin'],
  completion: ['completion bash > ~/.local/share/bash-completion/completions/qcow2', 'completion fish | source'],
  io: ["io -c 'read -P 0 0 64k' disk.qcow2", "io -f raw -c 'write -z 0 1M' -c flush disk.raw"],
  nbd: [
    'nbd -t -k /run/disk.sock -f qcow2 disk.qcow2',
    'nbd -p 10809 --object tls-creds-x509,id=t,dir=/etc/pki/nbd,endpoint=server --tls-creds t disk.qcow2',
  ],
}
