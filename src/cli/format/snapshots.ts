/** Snapshots as the documents that `info` and `snapshot -l` print. */

import type { SnapshotInfo } from '../../index.js'
import { exactText } from '../../text.js'
import type { SnapshotDocument } from './info.js'

export const snapshotDocuments = (snapshots: readonly SnapshotInfo<number | bigint>[]): SnapshotDocument[] =>
  snapshots.map(snapshot => ({
    id: exactText(snapshot.id, snapshot.idBytes),
    name: exactText(snapshot.name, snapshot.nameBytes),
    'vm-state-size': snapshot.vmStateSize,
    'date-sec': snapshot.dateSec,
    'date-nsec': snapshot.dateNsec,
    'vm-clock-sec': snapshot.vmClockSec,
    'vm-clock-nsec': snapshot.vmClockNsec,
    ...(snapshot.icount !== undefined && { icount: snapshot.icount }),
  }))
